"""Compile the kernels in the tables AOT of modules: compile_kernels.py TARGET=DTYPE,DTYPE... -- MODULE...

``TARGET=DTYPE/1`` compiles only the first combination of constants of each kernel.
"""

import importlib
import json
import multiprocessing
import os
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    **{f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32, "fp64": tl.float64}


def compile_kernel(kernel, pointers, constants, dtype, target):
    accumulate = "fp64" if dtype == "fp64" else "fp32"
    if "DTYPE" in kernel.arg_names:
        constants = {**constants, "DTYPE": DTYPES[dtype]}
    pointers = {name: pointer.replace("*A", f"*{accumulate}") for name, pointer in pointers.items()}
    place = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    signature = {name: "constexpr" if name in constants else pointers[name] for name in kernel.arg_names}
    # torch allocates on 16-byte boundaries, and a launch then specializes on it.
    attributes = {place[name]: [["tt.divisibility", 16]] for name in pointers if name not in constants}
    source = ASTSource(kernel, signature, {place[name]: value for name, value in constants.items()}, attributes)
    binary = triton.compile(source, target=TARGETS[target]).asm["hsaco" if target == "gfx942" else "cubin"]
    return len(binary)


def compile_entry(name, number, wanted):
    """Compile an entry of a module's table, and return (target, kernel, dtype) of each binary, and an error or None."""
    table = importlib.import_module(name).AOT
    kernel, pointers, variants = table[number]
    another = any(other is kernel for other, *_ in table[:number])  # form of a kernel that an earlier entry has
    made = []
    try:
        for target, dtypes in (each.split("=") for each in wanted):
            for dtype, _, most in (each.partition("/") for each in dtypes.split(",")):
                for constants in variants[: 0 if most and another else int(most) if most else None]:
                    compile_kernel(kernel, pointers, constants, dtype, target)
                    made.append((target, kernel.__name__, dtype))
    except Exception:
        return name, made, f"{kernel.__name__}, {target}, {dtype}, {constants}: {traceback.format_exc()}"
    return name, made, None


def main(arguments):
    """Print what was compiled and the errors, by module. Processes are forked, because the imports take seconds."""
    divider = arguments.index("--")
    wanted, names = arguments[:divider], arguments[divider + 1 :]
    results = {name: {"made": [], "errors": []} for name in names}
    tasks = [(name, number) for name in names for number in range(len(importlib.import_module(name).AOT))]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        for future in [pool.submit(compile_entry, *task, wanted) for task in tasks]:
            name, made, error = future.result()
            results[name]["made"] += made
            results[name]["errors"] += [error] if error else []
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
