"""A folder, read as an S3 bucket: Ray Serve LLM takes adapters from such places alone."""

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

from kvconnect.cli.processes import HOST


@contextlib.contextmanager
def bucket(folder: Path):
    """URL of a server; each folder in ``folder`` is a bucket."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            url = urlsplit(self.path)
            wanted = folder / url.path.lstrip("/")
            if "list-type" in url.query:
                return self.reply(200, listing(wanted, parse_qs(url.query)))
            if url.path.count("/") == 1 and wanted.is_dir():
                return self.reply(200, b"")
            if not wanted.is_file():
                return self.reply(404, b"")
            whole = wanted.read_bytes()
            if span := self.headers.get("Range"):
                first, last = span.removeprefix("bytes=").split("-")
                part = whole[int(first) : int(last) + 1]
                at = f"bytes {first}-{int(first) + len(part) - 1}/{len(whole)}"
                return self.reply(206, part, {"Content-Range": at})
            return self.reply(200, whole)

        def reply(self, status, body, headers=None):
            self.send_response(status)
            more = {"Last-Modified": self.date_time_string(0), "ETag": '"0"', **(headers or {})}
            for name, value in more.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    def listing(root, query):
        prefix, delimiter = (query.get(name, [""])[0] for name in ("prefix", "delimiter"))
        keys, prefixes = [], set()
        for file in sorted(root.rglob("*")):
            key = file.relative_to(root).as_posix()
            if not file.is_file() or not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
                continue
            size = f"<Size>{file.stat().st_size}</Size>"
            date = "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            keys.append(f"<Contents><Key>{escape(key)}</Key>{date}{size}</Contents>")
        keys += [
            f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>"
            for one in sorted(prefixes)
        ]
        count = f"<KeyCount>{len(keys)}</KeyCount><IsTruncated>false</IsTruncated>"
        return f"<ListBucketResult>{count}{''.join(keys)}</ListBucketResult>".encode()

    with ThreadingHTTPServer((HOST, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
