import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from unmask.engine.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    return torch.ones(4_000_000).add(1)  # 16 MB
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has its own habits")
def test_freed_memory_is_used_again_without_page_faults():
    faults = {
        way: int(subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True).stdout)
        for way in ("plain", "keep")
    }
    assert faults["keep"] * 5 < faults["plain"]
