from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Pages that are mapped anew while tensors of 48 MB come and go.
FAULTS = """
import resource, torch
from fastgan.trainer.device import keep_freed_memory
if {kept}:
    keep_freed_memory()
def use():
    torch.zeros(12 << 20)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives memory back")
def test_memory_that_is_freed_is_kept_for_the_next_tensor():
    by_default, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS.format(kept=kept)], capture_output=True, check=True).stdout)
        for kept in (False, True)
    )
    assert kept < 100 < by_default
