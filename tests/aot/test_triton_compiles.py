"""Every Triton kernel compiles ahead of time, without a GPU, for every supported GPU."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob("fastgan/ops/*/triton_kernels.py"))
# "/1": only the first combination of constants of each kernel. Products of float32 take the compiler longest.
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


def module_of(source):
    return ".".join(source.relative_to(ROOT).with_suffix("").parts)


@pytest.fixture(scope="module")
def compilations(tmp_path_factory):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(ROOT)}
    wanted = [f"{target}={dtypes}" for target, dtypes in TARGETS.items()]
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), *wanted, "--"]
    command += [module_of(source) for source in SOURCES]
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.parent.name)
def test_every_kernel_compiles_ahead_of_time(compilations, source, target):
    result = compilations[module_of(source)]
    assert result["errors"] == []
    for dtype in TARGETS[target].replace("/1", "").split(","):
        compiled = {kernel for where, kernel, stored in result["made"] if where == target and stored == dtype}
        assert compiled == launched_kernels(ast.parse(source.read_text()))


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.parent.name)
def test_every_launched_kernel_is_declared_for_compilation(source):
    tree = ast.parse(source.read_text())
    assert launched_kernels(tree), "no launch found: the launchers have another form than this test expects"
    assert declared_kernels(tree) == launched_kernels(tree)
