from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Count the pages that are mapped again while large tensors come and go. Each tensor is smaller than the one before, so
# it fits into the memory that the previous one freed.
FAULTS = """
import resource, torch
from fastgan.bench.heap import keep_freed_memory
if {kept}:
    keep_freed_memory()
torch.zeros(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for millions in (15, 14, 13):
    torch.zeros(millions << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.long
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives memory back")
def test_memory_that_is_freed_is_kept_for_the_next_tensor():
    by_default, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS.format(kept=kept)], capture_output=True, check=True).stdout)
        for kept in (False, True)
    )
    assert kept < by_default / 10, f"{kept} pages, by default {by_default}"
