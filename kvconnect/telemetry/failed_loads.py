"""The one line that each load that failed has in the log, wherever it loads from."""

import logging

logger = logging.getLogger(f"vllm.{__name__}")


def log_failed_load(
    request_id: str, error: str, peer: str, path: str, cause: str, remedy: str
) -> None:
    """Who, why, from whom, how, whose fault, and what to do; ``peer`` and ``path`` may be none."""
    logger.warning(
        'request %s: KV was not loaded: %s [peer=%s path=%s cause=%s remedy="%s"]',
        request_id,
        error,
        peer,
        path,
        cause,
        remedy,
    )
