"""Put faults into a copy of fastgan. The simulated tests must find each of them.

``python tests/simulated_gpu/mutations.py [NAME...]``: the status is 1 if a fault passes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TESTS_FAILED = 1  # pytest's status; anything else says that they didn't run
COPIED = ("fastgan", "tests", "pyproject.toml")


@dataclass(frozen=True)
class Mutation:
    """A text that occurs once in a file, its replacement, and the tests that must fail."""

    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    devices: int = 1
    deferred: bool = False


MUTATIONS = {
    "saved": Mutation(  # two tensors of one shape are saved for backward in the wrong order
        "fastgan/ops/norm/autograd.py",
        "ctx.save_for_backward(*arguments[:4])",
        "ctx.save_for_backward(arguments[1], arguments[0], *arguments[2:4])",
        ("test_ops.py", "-k", "both_orders and group_norm"),
    ),
    "guard": Mutation(  # a launch doesn't change to the device of its tensors
        "fastgan/ops/triton_language.py",
        "return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()",
        "return nullcontext()",
        ("test_two_devices.py", "-k", "fastgans"),
        devices=2,
    ),
    "allocation": Mutation(  # a gradient is allocated on the host
        "fastgan/ops/minibatch_discrimination/autograd.py",
        "dm = torch.empty_like(m)",
        'dm = torch.empty_like(m, device="cpu")',
        ("test_ops.py", "-k", "both_orders and minibatch_discrimination"),
    ),
    "default": Mutation(  # memory of the host is asked of the default device
        "fastgan/ops/spectral_norm/triton_plan.py",
        'zip(addresses, rows, strict=True)], device="cpu")',
        "zip(addresses, rows, strict=True)])",
        ("test_ops.py", "-k", "default_device"),
    ),
    "stream": Mutation(  # memory that another stream reads is given back at once
        "fastgan/ops/spectral_norm/triton_plan.py",
        "tensor.record_stream(stream)",
        "pass",
        ("test_deferred.py", "-k", "outlives"),
        deferred=True,
    ),
}


def is_found(name: str) -> bool:
    """Whether the tests fail on a copy with the fault."""
    mutation = MUTATIONS[name]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in COPIED:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / part, copy / part)
        path = copy / mutation.file
        text = path.read_text()
        if text.count(mutation.before) != 1:
            raise SystemExit(f"{mutation.file} has {mutation.before!r} {text.count(mutation.before)} times, not once")
        sound = _run(mutation, copy)
        if sound.returncode:
            raise SystemExit(f"{name}: the tests fail without the fault too:\n{sound.stdout}")
        path.write_text(text.replace(mutation.before, mutation.after))
        result = _run(mutation, copy)
    found = result.returncode == TESTS_FAILED
    # With --tb=line: "FILE:LINE: ERROR".
    said = [line.partition(": ")[2] for line in result.stdout.splitlines() if re.match(r"\S+\.py:\d+: ", line)]
    print(f"{'found' if found else 'MISSED':<7} {name:<11} {mutation.file}: {''.join(said[:1])}", flush=True)
    return found


def _run(mutation: Mutation, copy: Path) -> subprocess.CompletedProcess[str]:
    own = copy / "tests" / "simulated_gpu"
    file, *options = mutation.tests
    environment = {
        **os.environ,
        "SIMULATED_GPU": "1",
        "SIMULATED_GPU_DEVICES": str(mutation.devices),
        "SIMULATED_GPU_DEFERRED": str(int(mutation.deferred)),
        "SIMULATED_GPU_BUILD": str(ROOT / "build" / "simulated_gpu"),
        "PYTHONPATH": os.pathsep.join((str(own / "python"), str(copy))),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-p", "simulated_gpu.pytest_plugin"]
    return subprocess.run(
        [*command, str(own / file), *options], cwd=copy, env=environment, text=True, capture_output=True
    )


def main(names: list[str]) -> int:
    """Try the mutations named, or all."""
    if unknown := set(names) - set(MUTATIONS):
        sys.exit(f"no mutation {', '.join(unknown)}; there are {', '.join(MUTATIONS)}")
    found = [is_found(name) for name in names or MUTATIONS]
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
