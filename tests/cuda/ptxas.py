"""Report the registers, and the bytes of stack, spills, shared memory and constants of each kernel in csrc/cuda.

Prints JSON; ``ptxas.py > ptxas_report.json`` renews the record that test_ptxas_budget.py compares with.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
ARCHITECTURES = ("sm_80", "sm_90")
BUILTIN = {"f": "float", "d": "double"}
FLAGS = ("-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra")


def report():
    sources = sorted(CSRC.glob("cuda/*.cu"))
    pairs = [(source, architecture) for source in sources for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        kernels = [kernel for found in pool.map(lambda pair: compile_one(*pair), pairs) for kernel in found]
    version = re.search(r"release (\S+), V(\S+)", output("nvcc", "--version"))[2]
    return {"nvcc": version, "kernels": dict(sorted(kernels))}


def compile_one(source, architecture):
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory, "kernels.cubin")
        flags = [*FLAGS, f"-arch={architecture}", f"-I{CSRC}", "-Xptxas", "-v", "-cubin"]
        text = output("nvcc", *flags, str(source), "-o", str(target))
    blocks = re.split(r"Compiling entry function '(\S+)'", text)[1:]
    for mangled, block in zip(blocks[::2], blocks[1::2], strict=True):
        yield f"{source.name} {architecture} {kernel_name(mangled)}", resources(block)


def kernel_name(mangled):
    """``..14forward_kernelI6__halfEEv..`` is forward_kernel<__half>; the rest depends on the source's path."""
    kernel, argument = re.search(r"\d([a-z_]+_kernel)I\d*(\w+?)E", mangled).groups()
    return f"{kernel}<{BUILTIN.get(argument, argument)}>"


def resources(block):
    numbers = {
        "registers": r"Used (\d+) registers",
        "stack": r"(\d+) bytes stack frame",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
        "shared": r"(\d+) bytes smem",
    }
    found = {key: re.search(pattern, block) for key, pattern in numbers.items()}
    return {key: int(match[1]) if match else 0 for key, match in found.items()}


def output(*command):
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stdout}")
    return result.stdout


if __name__ == "__main__":
    print(json.dumps(report(), indent=1))
