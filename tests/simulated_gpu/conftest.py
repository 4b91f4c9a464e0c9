"""These tests run on the simulated device, in processes of their own: `make test-gpu-simulated`."""

from __future__ import annotations

import os
import sys

# Elsewhere, where PyTorch has been imported without the device, they aren't collected.
if "simulated_gpu" not in sys.modules or os.environ.get("SIMULATED_GPU", "0") == "0":
    collect_ignore_glob = ["test_*.py"]
