"""``python -m kvconnect.cli``: the command where no script is installed."""

from kvconnect.cli import main

main()
