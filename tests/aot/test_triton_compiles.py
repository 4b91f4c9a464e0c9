"""Every Triton kernel compiles ahead of time, without a GPU, for every supported GPU."""

import ast
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob("fastgan/ops/*/triton_kernels.py"))
# "/1": only the first combination of constants. Products of float32 take the compiler longest.
TARGETS = {"sm_90": "bf16/1"}
if os.environ.get("FASTGAN_TESTS") == "all":
    TARGETS = {"sm_80": "fp32", "sm_90": "fp32,bf16", "sm_100": "fp32", "sm_120": "fp32", "gfx942": "fp32"}


def launched_kernels(tree):
    """Return the names in ``name[grid](...)`` and ``_launch...(name, ...)``, whose parameter is called ``kernel``."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    launched = [call.func.value for call in calls if isinstance(call.func, ast.Subscript)]
    launched += [
        call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id.startswith("_launch")
    ]
    return {value.id for value in launched if isinstance(value, ast.Name)} - {"kernel"}


def declared_kernels(tree):
    """Return the kernels in ``AOT = [(kernel, pointers, variants), ...]``."""
    (value,) = (n.value for n in tree.body if isinstance(n, ast.AnnAssign | ast.Assign) and assigns(n, "AOT"))
    return {entry.elts[0].id for entry in value.elts}


def assigns(node, name):
    targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
    return any(isinstance(t, ast.Name) and t.id == name for t in targets)


def compile_all(source, cache):
    module = ".".join(source.relative_to(ROOT).with_suffix("").parts)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    wanted = [f"{target}={dtypes}" for target, dtypes in TARGETS.items()]
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), module, *wanted]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compilations(tmp_path_factory):
    cache = tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda source: compile_all(source, cache), SOURCES)
        return dict(zip(SOURCES, results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.parent.name)
def test_every_kernel_compiles_ahead_of_time(compilations, source, target):
    result = compilations[source]
    made = [line.split() for line in result.stdout.splitlines()]
    for dtype in TARGETS[target].replace("/1", "").split(","):
        compiled = {kernel for where, kernel, stored, *_ in made if where == target and stored == dtype}
        assert compiled == launched_kernels(ast.parse(source.read_text())), result.stderr
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.parent.name)
def test_every_launched_kernel_is_declared_for_compilation(source):
    tree = ast.parse(source.read_text())
    assert launched_kernels(tree), "no launch found: the launchers have another form than this test expects"
    assert declared_kernels(tree) == launched_kernels(tree)
