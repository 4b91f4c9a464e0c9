from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastgan"
# Imports run downwards only.
FLOORS = ["backends", "ops", "drop_in", "nn", "convert", "launcher", "bench", "trainer", "cli"]
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of fastgan that a file imports, relative imports resolved."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "fastgan"}


def room_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if room not in FLOORS:
        assert path.parent == PACKAGE, f"{room} is not in the list of rooms"
        return
    for name in imported(path):
        other = room_of(name)
        if other in FLOORS:
            assert FLOORS.index(other) <= FLOORS.index(room), f"{path} imports {name}"


# Inside the trainer too; files that share a floor may import each other.
TRAINER = [
    {"errors", "device", "ranks", "lock", "probe", "checks"},
    {"data"},
    {"game"},
    {"config", "settings", "flags", "arguments", "checkpoint"},
    {"models"},
    {"gan"},
    {"measure", "run", "progress"},
    {"report", "tune", "verify", "export", "use"},
    {"start"},
    {"loop"},
]


def trainer_floor(part: str) -> int:
    (floor,) = [number for number, parts in enumerate(TRAINER) if part in parts]
    return floor


@pytest.mark.parametrize("path", sorted((PACKAGE / "trainer").rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_inside_the_trainer_run_one_way(path):
    room = path.relative_to(PACKAGE / "trainer").with_suffix("").parts[0]
    for name in imported(path):
        target = name.split(".")
        if target[:2] == ["fastgan", "trainer"] and len(target) > 2 and room != "__init__":
            assert trainer_floor(target[2]) <= trainer_floor(room), f"{path} imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_op_imports_the_kernels_of_another(path):
    room = path.relative_to(PACKAGE / "ops").parts[0]
    for name in imported(path):
        target = name.split(".")
        if target[1] == "ops" and any(part.endswith("_kernels") for part in target):
            assert target[2] == room, f"{path} imports {name}"


def test_importing_the_package_does_not_import_the_trainer():
    import subprocess
    import sys

    code = (
        "import sys, fastgan; print([m for m in sys.modules if m.startswith(('fastgan.trainer', 'triton.', 'tyro'))])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


def test_source_files_have_at_most_500_lines():
    for path in [*FILES, *(ROOT / "csrc").rglob("*.c*"), *(ROOT / "csrc").rglob("*.h")]:
        lines = len(path.read_text().splitlines())
        assert lines <= 500, f"{path} has {lines} lines: split it"
