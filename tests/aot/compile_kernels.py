"""Compile the kernels in the table AOT of a module: compile_kernels.py MODULE TARGET=DTYPE,DTYPE...

``TARGET=DTYPE/1`` compiles only the first combination of constants of each entry.
"""

import importlib
import sys

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


def main(module, *wanted):
    """Print a line for each kernel that compiles, and stop at the first that does not."""
    for target, dtypes in (each.split("=") for each in wanted):
        for kernel, pointers, variants in importlib.import_module(module).AOT:
            for dtype, _, most in (each.partition("/") for each in dtypes.split(",")):
                for constants in variants[: int(most) if most else None]:
                    size = compile_kernel(kernel, pointers, constants, dtype, target)
                    print(target, kernel.__name__, dtype, constants, f"{size} bytes", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
