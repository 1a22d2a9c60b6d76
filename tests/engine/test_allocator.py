import platform

import pytest

from unmask.engine.allocator import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has its own habits")
def test_glibc_takes_the_settings():
    assert keep_freed_memory()
