"""The line that each load that failed has in the log."""

import re

FAILED_LOAD = re.compile(
    r"request (?P<request>\S+): KV was not loaded: (?P<error>.+) \[peer=(?P<peer>\S+) "
    r'path=(?P<path>\S+) cause=(?P<cause>\S+) remedy="(?P<remedy>.+)"\]'
)


def failed_loads(caplog):
    """Each such line, in its parts."""
    said = [FAILED_LOAD.fullmatch(record.getMessage()) for record in caplog.records]
    return [found.groupdict() for found in said if found]
