"""Triton through its interpreter where there is no GPU, and memory that is never zero by luck."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when Triton and fastgan are imported

from torch._dynamo import trace_rules  # imports Triton


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every uninitialised floating tensor starts as NaN: an element that a kernel forgets to write shows."""
    trace_rules.get_torch_obj_rule_map()  # Dynamo looks PyTorch's functions up once, and anew after init_process_group
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        original = getattr(owner, name)

        def poisoned(*args: object, _original=original, **kwargs: object) -> torch.Tensor:
            tensor = _original(*args, **kwargs)
            if type(tensor) is torch.Tensor and tensor.is_floating_point() and tensor.device.type != "meta":
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        monkeypatch.setattr(owner, name, poisoned)


@pytest.fixture(autouse=True)
def no_discriminator_is_small(request: pytest.FixtureRequest) -> Iterator[None]:
    """Penalties of the tests' discriminators, small as they are, are fastgan's own; marked ``small``, as users' are."""
    from fastgan.ops.gradient_penalty.small import at_any_size  # once Triton knows that it interprets

    with nullcontext() if request.node.get_closest_marker("small") else at_any_size():
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def exact_products() -> None:
    """On a GPU these round their operands to TF32, and add up in any order, unless they are told not to."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


@pytest.fixture(autouse=True)
def usable_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """After an error in a kernel a process can do nothing more on its GPU: of several, the others go on."""
    yield
    if torch.cuda.is_available() and request.node.get_closest_marker("gpu"):
        try:
            torch.rand(1, device="cuda").sum().item()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(1)
            pytest.exit(f"the GPU is lost: {error}".partition("\n")[0])


# Large tables, of which a run takes one row in so many, always the same ones; FASTGAN_TESTS=all takes them whole.
THINNED = {
    "test_compiled_penalties.py": 4,
    "test_one_pass_idioms.py": 2,
    "test_penalty_conventions.py": 2,
    "test_penalty_options.py": 2,
    "test_piecewise.py": 3,
    "test_scaled_dot_product_attention.py": 4,
    "test_second_derivatives.py": 2,
    "test_sharded_penalties.py": 3,
    "test_spectral_norm_as_pytorch.py": 2,
    "test_spectral_norm_traced.py": 3,
    "test_tracers.py": 3,
    "test_zeros.py": 3,
}

LONG = ("aot", "cuda", "native", "install", "distributed")  # folders whose tests take minutes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", metavar="I/N", help="of the tests chosen, the I-th of N parts, next to each other")


def thin(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect rows of the large tables by a hash of their names, so that no argument's values fall in step with it."""
    left_out = [
        item
        for item in items
        if hasattr(item, "callspec") and zlib.crc32(item.nodeid.encode()) % THINNED.get(item.path.name, 1)
    ]
    if left_out and not (config.option.keyword or config.option.share or "::" in " ".join(config.args)):
        config.hook.pytest_deselected(items=left_out)
        chosen = set(left_out)
        items[:] = [item for item in items if item not in chosen]


@pytest.hookimpl(trylast=True)  # of what -m and -k have left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long tests first: of files that are shared out among processes, a long one at the end keeps the others idle."""
    if os.environ.get("FASTGAN_TESTS") != "all":
        thin(config, items)
    if config.option.share:
        part, parts = map(int, config.option.share.split("/"))
        items[:] = items[len(items) * (part - 1) // parts : len(items) * part // parts]
    items.sort(key=lambda item: LONG.index(item.path.parent.name) if item.path.parent.name in LONG else len(LONG))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
