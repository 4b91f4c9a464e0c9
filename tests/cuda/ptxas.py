"""Report the registers, and the bytes of stack, spills, shared memory and constants of each kernel in csrc/cuda.

Prints JSON; ``ptxas.py > ptxas_report.json`` renews the record that test_ptxas_budget.py compares with. With
``--quick`` for one architecture only, and without compiling if the module was built here for one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}" / "cuda"  # of setup.py
ARCHITECTURES = ("sm_80", "sm_90")
BUILTIN = {"f": "float", "d": "double"}
FLAGS = ("-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra")


def report(architectures=ARCHITECTURES):
    pairs = [(source, architecture) for source in sources() for architecture in architectures]
    with ThreadPoolExecutor(2) as pool:
        kernels = [kernel for found in pool.map(lambda pair: compile_one(*pair), pairs) for kernel in found]
    version = re.search(r"release (\S+), V(\S+)", output("nvcc", "--version"))[2]
    return {"nvcc": version, "kernels": dict(sorted(kernels))}


def report_of_build():
    """Return the report that building the module here wrote, or None if it is missing, stale or of another GPU."""
    written = [BUILD / "ptxas" / f"{source.stem}.txt" for source in sources()]
    changed = max(path.stat().st_mtime for part in ("cuda", "common") for path in (CSRC / part).iterdir())
    if not all(path.exists() and path.stat().st_mtime > changed for path in (*written, BUILD / "cuda.json")):
        return None
    about = json.loads((BUILD / "cuda.json").read_text())
    architecture = f"sm_{about['architectures'].removesuffix('-real')}"
    if architecture not in ARCHITECTURES:
        return None
    texts = [path.read_text() for path in written]
    if any("warning" in text.lower() for text in texts):
        sys.exit("\n".join(texts))
    named = zip(sources(), texts, strict=True)
    kernels = [kernel for source, text in named for kernel in kernels_in(text, source, architecture)]
    return {"nvcc": about["nvcc"], "kernels": dict(sorted(kernels))}


def sources():
    return sorted(CSRC.glob("cuda/*.cu"))


def compile_one(source, architecture):
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory, "kernels.cubin")
        flags = [*FLAGS, f"-arch={architecture}", f"-I{CSRC}", "-Xptxas", "-v", "-cubin"]
        return kernels_in(output("nvcc", *flags, str(source), "-o", str(target)), source, architecture)


def kernels_in(text, source, architecture):
    """Yield the name and the resources of each kernel in what ``ptxas -v`` printed."""
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
    if "--quick" in sys.argv:
        print(json.dumps(report_of_build() or report(ARCHITECTURES[-1:]), indent=1))
    else:
        print(json.dumps(report(), indent=1))
