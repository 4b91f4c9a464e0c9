"""Run Triton in its interpreter if there is no GPU, and fill uninitialized memory with NaN."""

from __future__ import annotations

import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when Triton and fastgan are imported

from torch._dynamo import trace_rules  # imports Triton


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialized floating-point tensors with NaN, which exposes elements that a kernel does not write."""
    trace_rules.get_torch_obj_rule_map()  # Dynamo looks up PyTorch's functions once, and again after init_process_group
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
def no_discriminator_is_small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use fastgan's functions at the small sizes of the tests. The marker ``small`` restores the default."""
    from fastgan.ops.attention import layout  # after TRITON_INTERPRET is set
    from fastgan.ops.gradient_penalty.small import at_any_size

    is_small = request.node.get_closest_marker("small") is not None
    if not is_small:
        monkeypatch.setattr(layout, "FEW", 0)
    with nullcontext() if is_small else at_any_size():
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def exact_products() -> None:
    """Disable TF32 and nondeterministic sums in cuDNN and cuBLAS."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


@pytest.fixture(autouse=True)
def usable_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """End this process if an error in a kernel has made its GPU unusable. Other pytest-xdist workers continue."""
    yield
    if torch.cuda.is_available() and request.node.get_closest_marker("gpu"):
        try:
            torch.rand(1, device="cuda").sum().item()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(1)
            pytest.exit(f"the GPU is lost: {error}".partition("\n")[0])


# Files with large tables. A run takes about one row in this many, always the same ones. FASTGAN_TESTS=all runs all
# rows. Runs with -k or of single tests take all rows, too, except with FASTGAN_TESTS=thin.
THINNED = {
    "test_attention_in_models.py": 4,
    "test_attention_shapes.py": 8,
    "test_batch_norm.py": 2,
    "test_bias_act.py": 6,
    "test_cases.py": 4,
    "test_changes_between_calls.py": 3,
    "test_compilable.py": 5,
    "test_compiled_idioms.py": 4,
    "test_compiled_penalties.py": 8,
    "test_families.py": 2,
    "test_fuse_spectral_norm.py": 2,
    "test_learning.py": 2,
    "test_meta_and_subclasses.py": 2,
    "test_minibatch_discrimination.py": 6,
    "test_minibatch_stddev.py": 4,
    "test_norm.py": 8,
    "test_norm_input.py": 3,
    "test_one_pass_idioms.py": 2,
    "test_one_pass_rare_calls.py": 2,
    "test_one_pass_writes.py": 2,
    "test_penalty_conventions.py": 2,
    "test_penalty_inputs.py": 2,
    "test_penalty_options.py": 2,
    "test_piecewise.py": 3,
    "test_scaled_dot_product_attention.py": 12,
    "test_second_derivatives.py": 2,
    "test_spectral_norm.py": 8,
    "test_spectral_norm_as_pytorch.py": 2,
    "test_spectral_norm_traced.py": 5,
    "test_stylegan_ops.py": 3,
    "test_surroundings.py": 2,
    "test_third_order.py": 4,
    "test_tracers.py": 4,
    "test_upfirdn2d.py": 6,
    "test_values_not_stored.py": 4,
    "test_zeros.py": 3,
}

FEW = 4  # an argument with at most so many values, such as backends and dtypes, keeps all of them

# Tests of which the interpreter's rows take seconds and add little to those of the other backends
INTERPRETED_LONG = (
    "test_opcheck_accepts_the_operators",
    "test_the_same_inputs_give_the_same_bits",
    "test_gradcheck_and_gradgradcheck_hold",
    "test_strides_do_not_matter",
    "test_large_scores_neither_overflow_nor_vanish",
)

# Folders and files whose tests take the longest
LONG = ("aot", "cuda", "native", "install", "distributed", "launcher", "test_robustness.py", "test_site.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", metavar="I/N", help="run the I-th of N consecutive parts of the selected tests")


def chosen_rows(rows: list[pytest.Item], one_in: int) -> set[pytest.Item]:
    """Choose rows of a table by a hash of their names, at least one, and one of each value of arguments with few."""
    chosen = {row for row in rows if zlib.crc32(row.nodeid.encode()) % one_in == 0} or {rows[0]}
    if rows[0].path.parent.name == "integrations":  # each row compiles, which takes seconds
        return chosen
    values = {row: {(name, repr(value)) for name, value in row.callspec.params.items()} for row in rows}
    taken = Counter(name for name, _ in set().union(*values.values()))
    seen = set().union(*(values[row] for row in chosen))
    for row in rows:
        if any(taken[name] <= FEW and (name, value) not in seen for name, value in values[row]):
            chosen.add(row)
            seen |= values[row]
    return chosen


def thin(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect rows of the large tables."""
    tables = defaultdict(list)
    for item in items:
        if item.path.name in THINNED and hasattr(item, "callspec") and not item.get_closest_marker("long"):
            tables[item.nodeid.partition("[")[0]].append(item)
    left_out = []
    for rows in tables.values():
        chosen = chosen_rows(rows, THINNED[rows[0].path.name])
        left_out += [row for row in rows if row not in chosen]
    selected = config.option.keyword or config.option.share or "::" in " ".join(config.args)
    if left_out and (not selected or os.environ.get("FASTGAN_TESTS") == "thin"):
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the long files first. A long file at the end would leave the other workers idle."""
    if os.environ.get("FASTGAN_TESTS") != "all":
        thin(config, items)
    if config.option.share:
        part, parts = map(int, config.option.share.split("/"))
        items[:] = items[len(items) * (part - 1) // parts : len(items) * part // parts]
    items.sort(key=lambda item: next((i for i, name in enumerate(LONG) if name in item.path.parts[-2:]), len(LONG)))
    reasons = {} if torch.cuda.is_available() else {"gpu": "needs a CUDA device"}
    if os.environ.get("FASTGAN_TESTS") != "all":
        reasons["long"] = "takes long: FASTGAN_TESTS=all runs it"
    for item in items:
        name, _, row = item.name.partition("[")
        if name in INTERPRETED_LONG and "triton" in row and not torch.cuda.is_available():
            item.add_marker(pytest.mark.long)
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
