"""A hook of mkdocs: the site has the repository's pages, wherever they are.

README.md is its front page. Links between pages, and to files beside them, are those that are right
in a checkout too: a file that a page links to is copied, and a folder becomes its README or text.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ["*.md", "docs/**/*.md", "examples/*.md", "deploy/**/*.md"]
SHOWN = re.compile(r"\]\(([^)#:\s]+)")
"""What a page links to, pictures too."""
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files, *, config):
    """The theme's files, our pages, and what these link to."""
    ours = Files([one for one in files if one.src_dir != config.docs_dir])
    pages = {path for pattern in PAGES for path in ROOT.glob(pattern)}
    for path in sorted(pages | {target for page in pages for target in _linked(page)}):
        name = path.relative_to(ROOT).as_posix()
        file = File(name, str(ROOT), config.site_dir, config.use_directory_urls)
        file.dest_uri = file.dest_uri.removeprefix("docs/")
        ours.append(file)
    return ours


def _linked(page):
    targets = [page.parent / target for target in SHOWN.findall(page.read_text())]
    return {found.resolve() for found in targets if found.is_file() and found.suffix != ".md"}


def on_page_markdown(markdown, *, page, **_):
    """Folders have no page of their own."""
    folder = (ROOT / page.file.src_uri).parent

    def replaced(link):
        text, target, _ = link.groups()
        if not (folder / target).is_dir():
            return link[0]
        readme = folder / target / "README.md"
        return f"[{text}]({target.rstrip('/')}/README.md)" if readme.exists() else text

    return LINK.sub(replaced, markdown)
