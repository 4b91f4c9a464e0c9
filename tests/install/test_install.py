"""The sdist and its wheels: their contents, and that they work after installation."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILT = shutil.ignore_patterns(
    "__pycache__", "*.so", "_build_info.json", "build", ".venv", "runs", ".git", "*.egg-info"
)
OUR_VARIABLES = ("FASTGAN_BUILD", "FASTGAN_CUDA", "CMAKE_BUILD_PARALLEL_LEVEL", "MAX_JOBS", "PYTHONPATH")


def run(*command: object, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in OUR_VARIABLES}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def succeed(*command: object, cwd: Path | None = None, **variables: str) -> str:
    result = run(*command, cwd=cwd, **variables)
    assert result.returncode == 0, result.stdout
    return result.stdout


# These tests check which files are built and installed, so they compile without optimization and vector sets.
SETTINGS = {"FASTGAN_CUDA": "off", "CMAKE_ARGS": "-DCMAKE_CXX_FLAGS_RELEASE=-O0 -DFASTGAN_ISAS="}


def build_wheel(source: Path, destination: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--verbose"]
    return run(*pip, "--wheel-dir", destination, source, **(SETTINGS | variables))


def only_wheel(result: subprocess.CompletedProcess[str], destination: Path) -> Path:
    assert result.returncode == 0, result.stdout
    (wheel,) = destination.glob("*.whl")
    return wheel


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def build_info(wheel: Path) -> dict[str, dict[str, object]]:
    with zipfile.ZipFile(wheel) as archive:
        return dict(json.loads(archive.read("fastgan/_build_info.json")))


def install(wheel: Path, directory: Path) -> Path:
    """Create an environment with only this wheel, and return its interpreter."""
    succeed(sys.executable, "-m", "venv", "--without-pip", directory)
    python = directory / "bin" / "python"
    succeed(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel)
    return python


def with_torch(python: Path, *arguments: object) -> str:
    """Run the interpreter of the other environment with this environment's torch, but not its fastgan."""
    return succeed(python, *arguments, cwd=python.parent, PYTHONPATH=sysconfig.get_path("purelib"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A copy, because building leaves files in the tree.
    source = shutil.copytree(ROOT, tmp_path_factory.mktemp("checkout") / "fastgan", ignore=BUILT)
    destination = tmp_path_factory.mktemp("sdist")
    succeed(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", destination, source)
    (archive,) = destination.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(directory, filter="data")
    (source,) = directory.iterdir()
    return source


@pytest.fixture(scope="module")
def native_wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("native")
    return only_wheel(build_wheel(unpacked, destination, FASTGAN_BUILD="require"), destination)


@pytest.fixture(scope="module")
def native_python(native_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(native_wheel, tmp_path_factory.mktemp("venv") / "native")


@pytest.fixture(scope="module")
def pure_wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Built in the same folder as native_wheel, whose modules are still there if that was made."""
    if os.environ.get("FASTGAN_TESTS") == "all":
        request.getfixturevalue("native_wheel")
    destination = tmp_path_factory.mktemp("pure")
    return only_wheel(build_wheel(unpacked, destination, FASTGAN_BUILD="off"), destination)


def modules() -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / "fastgan").rglob("*.py")} | {"fastgan_command.py"}


def test_the_sdist_holds_the_sources_and_nothing_else(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    native = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    project = {"pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"}
    metadata = {name for name in names if name.startswith("fastgan.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names == native | modules() | project | metadata | {"fastgan/py.typed"}


@pytest.mark.long
def test_the_native_wheel_holds_the_package_and_nothing_else(native_wheel: Path) -> None:
    names = {name for name in contents(native_wheel) if ".dist-info/" not in name}
    native = f"fastgan/_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert names == modules() | {native, "fastgan/_build_info.json", "fastgan/py.typed"}


@pytest.mark.long
def test_the_native_wheel_is_tagged_with_its_platform(native_wheel: Path) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert native_wheel.name.endswith(f"{platform}.whl")
    assert "-none-any" not in native_wheel.name


@pytest.mark.long
def test_the_build_record_says_what_was_built_and_why_not_the_rest(native_wheel: Path) -> None:
    info = build_info(native_wheel)
    assert info["native"]["built"] is True
    assert info["native"]["isa"][0] == "baseline"
    assert info["cuda"] == {"built": False, "reason": "built with FASTGAN_CUDA=off"}


@pytest.mark.long
def test_the_native_module_imports_where_there_is_no_torch(native_python: Path) -> None:
    # The module itself, for the package around it imports torch.
    script = """
import glob, importlib.util, sysconfig
assert importlib.util.find_spec("torch") is None
(path,) = glob.glob(sysconfig.get_path("platlib") + "/fastgan/_native*.so")
spec = importlib.util.spec_from_file_location("fastgan._native", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print("loaded", module.__name__)
"""
    assert "loaded fastgan._native" in succeed(native_python, "-I", "-c", script)


SMOKE = """
import sys, torch, fastgan, fastgan.nn as fnn
assert fastgan.__file__.startswith(sys.prefix), fastgan.__file__
torch.manual_seed(0)
layer = torch.nn.Conv2d(3, 8, 3)
expected = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv2d(3, 8, 3)).eval()
normed = fnn.utils.spectral_norm(layer).eval()
normed.load_state_dict(expected.state_dict())
x = torch.randn(2, 3, 9, 9)
with fastgan.use_backend(sys.argv[1]):
    torch.testing.assert_close(normed(x), expected(x), rtol=1e-5, atol=1e-6)
print(fastgan.info())
"""


@pytest.mark.long
def test_an_installed_native_wheel_computes_what_torch_does(native_python: Path) -> None:
    assert "baseline" in with_torch(native_python, "-c", SMOKE, "cpu")


@pytest.mark.long
def test_the_installed_command_runs(native_python: Path) -> None:
    assert "_native_cuda: no: built with FASTGAN_CUDA=off" in with_torch(
        native_python, native_python.with_name("fastgan"), "info"
    )


def test_build_off_gives_a_pure_wheel(pure_wheel: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    names = {name for name in contents(pure_wheel) if ".dist-info/" not in name}
    assert names == modules() | {"fastgan/_build_info.json", "fastgan/py.typed"}


def test_an_installed_pure_wheel_works_and_says_what_it_lacks(pure_wheel: Path, tmp_path: Path) -> None:
    info = with_torch(install(pure_wheel, tmp_path / "venv"), "-c", SMOKE, "reference")
    assert "built with FASTGAN_BUILD=off" in info


def test_without_a_compiler_auto_builds_a_pure_wheel_and_records_why(unpacked: Path, tmp_path: Path) -> None:
    result = build_wheel(unpacked, tmp_path, CXX="/nonexistent/c++")
    wheel = only_wheel(result, tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    reason = "no C++ compiler: CXX is /nonexistent/c++, which was not found"
    assert build_info(wheel)["native"] == {"built": False, "reason": reason}
    assert f"fastgan._native is left out: {reason}" in result.stdout


def test_auto_survives_sources_that_do_not_compile(unpacked: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(unpacked, tmp_path / "broken", ignore=BUILT)
    (broken / "csrc" / "native.cpp").write_text("#error deliberately broken\n")
    for folder in ("bindings", "cpu"):
        for source in (broken / "csrc" / folder).glob("*.cpp"):
            source.write_text("")
    wheel = only_wheel(build_wheel(broken, tmp_path), tmp_path)
    assert "deliberately broken" in str(build_info(wheel)["native"]["reason"])


NO_COMPILER = (
    {"FASTGAN_BUILD": "require", "CXX": "/nonexistent/c++"},
    "FASTGAN_BUILD=require, but fastgan._native cannot be built: no C++ compiler",
)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        NO_COMPILER,
        (
            {"FASTGAN_CUDA": "require", "CUDACXX": "/nonexistent/nvcc", "CXX": "/nonexistent/c++"},
            "FASTGAN_CUDA=require, but fastgan._native_cuda cannot be built: no nvcc",
        ),
        ({"FASTGAN_BUILD": "yes"}, "FASTGAN_BUILD must be auto, require or off, got 'yes'"),
        ({"FASTGAN_CUDA": "1"}, "FASTGAN_CUDA must be auto, require or off, got '1'"),
        (
            {"FASTGAN_BUILD": "off", "FASTGAN_CUDA": "require"},
            "FASTGAN_CUDA=require contradicts FASTGAN_BUILD=off",
        ),
        ({"MAX_JOBS": "many"}, "MAX_JOBS must be a positive integer, got 'many'"),
    ],
    ids=["no compiler", "no nvcc", "FASTGAN_BUILD", "FASTGAN_CUDA", "contradiction", "MAX_JOBS"],
)
def test_a_build_that_cannot_be_as_asked_fails_and_says_why(
    unpacked: Path, variables: dict[str, str], message: str
) -> None:
    result = run(sys.executable, "setup.py", "build_native", cwd=unpacked, **(SETTINGS | variables))
    assert result.returncode != 0
    assert message in result.stdout


def test_pip_makes_no_wheel_of_a_build_that_failed(unpacked: Path, tmp_path: Path) -> None:
    variables, message = NO_COMPILER
    result = build_wheel(unpacked, tmp_path, **variables)
    assert result.returncode != 0
    assert message in result.stdout
    assert not list(tmp_path.glob("*.whl"))
