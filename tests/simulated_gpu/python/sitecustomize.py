"""Python imports this at its start, where this folder is in PYTHONPATH: SIMULATED_GPU=1 then gives it its devices."""

import os

if os.environ.get("SIMULATED_GPU", "0") != "0":
    import simulated_gpu

    simulated_gpu.install()
