"""How a CPU training asks the system for memory."""

from __future__ import annotations

import ctypes
import functools
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_LARGEST_THRESHOLD = 32 * 2**20  # glibc refuses more for blocks of their own


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next step, which asks for the same sizes again; whether it could be told.

    By default every large activation is given back to the system and fetched again, page by page and zeroed, each step.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    told = [mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD), mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)]
    return all(told)
