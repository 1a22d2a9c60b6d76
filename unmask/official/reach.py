"""Whether the Hub can be reached, asked once and without its client's warnings."""

from __future__ import annotations

import logging
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass


@contextmanager
def quick_hub() -> Iterator[None]:
    """While open, a Hub that cannot be reached is not asked again and again: one try of a few seconds, then only what was
    downloaded before; without the client's own warnings."""
    from huggingface_hub import constants

    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "timm", "httpx")]
    before = constants.HF_HUB_OFFLINE, [logger.level for logger in loggers]
    constants.HF_HUB_OFFLINE = before[0] or not _reachable(str(constants.ENDPOINT))
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = before[0]
        for logger, level in zip(loggers, before[1], strict=True):
            logger.setLevel(level)


def _reachable(address: str, seconds: float = 5.0) -> bool:
    """Whether an address (or the proxy in front of it) answers at all."""
    scheme = urlsplit(address).scheme or "https"
    proxy = None if proxy_bypass(urlsplit(address).hostname or "") else getproxies().get(scheme)
    place = urlsplit(proxy if proxy and "//" in proxy else f"http://{proxy}") if proxy else urlsplit(address)
    port = place.port or (80 if place.scheme == "http" else 443)
    try:
        with socket.create_connection((place.hostname or "", port), timeout=seconds):
            return True
    except OSError:
        return False
