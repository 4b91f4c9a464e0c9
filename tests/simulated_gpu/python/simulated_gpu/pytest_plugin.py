"""``pytest -p simulated_gpu.pytest_plugin``: options for tests that run on the simulated device."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from types import FrameType

import pytest
from pluggy import Result

from simulated_gpu.refusals import NotSimulated


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("simulated GPU")
    group.addoption("--on-cuda", action="store_true", help="cuda is the default device: CPU tests run on it")
    group.addoption("--without-triton", action="store_true", help="PyTorch's operations in Triton's place: fast")
    group.addoption("--test-seconds", type=int, default=120, help="a test that takes more of the CPU fails")


def pytest_configure(config: pytest.Config) -> None:
    from simulated_gpu import is_installed

    if not is_installed():
        raise pytest.UsageError("there is no simulated GPU in this process: set SIMULATED_GPU=1")
    if config.option.on_cuda:
        import torch

        torch.set_default_device("cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if parameters.get("backend") == "cuda":
            item.add_marker(pytest.mark.skip(reason="the simulated GPU runs no native CUDA kernels"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Result[None], None]:
    """Limit the time of a test, and skip it if the simulation refuses a call."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the test took more than {item.config.option.test_seconds} s of the CPU")

    # Not the clock's time: cores may be shared with others.
    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, item.config.option.test_seconds)
    outcome = yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    if outcome.excinfo is not None and issubclass(outcome.excinfo[0], NotSimulated):
        outcome.force_exception(pytest.skip.Exception(str(outcome.excinfo[1])))


@pytest.fixture(autouse=True)
def _triton_as_asked_for(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not pytestconfig.option.without_triton:
        yield
        return
    from fastgan import backends

    monkeypatch.setitem(backends._MISSING, "triton", lambda device_type: "it is switched off for this run")
    backends._choose.cache_clear()
    yield
    backends._choose.cache_clear()
