"""Python imports this file when it starts, if this folder is in PYTHONPATH. SIMULATED_GPU=1 adds the devices."""

import os

if os.environ.get("SIMULATED_GPU", "0") != "0":
    import simulated_gpu

    simulated_gpu.install()
