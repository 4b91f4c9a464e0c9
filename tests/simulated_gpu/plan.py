"""The parts that run on the simulated device. Each part is one process of pytest."""

from __future__ import annotations

from dataclasses import dataclass, field

OWN = "tests/simulated_gpu"
TRAINER = (
    "tests/trainer/game",
    "tests/trainer/verify",
    "tests/trainer/test_loop.py",
    "tests/trainer/test_robustness.py",
)
PENALTIES = "tests/ops/test_penalty_kinds.py"
PROGRAMS = ("compile", "size_rule", "programs")
GRAPHS = ("tests/integrations/test_cuda_graphs.py", "tests/integrations/test_graphed_step.py")

# Tests whose subject is the CPU; with cuda as the default device they test nothing, or something else.
ABOUT_THE_CPU = {
    "tests/nn/test_minibatch_discrimination.py::test_autocast_keeps_the_dtype_of_the_input": "autocast of the CPU",
    "tests/nn/test_spectral_norm.py::test_autocast_multiplies_in_half_precision_and_normalizes_in_single": "the same",
    "tests/nn/test_fuse_spectral_norm.py::test_a_fused_model_takes_one_call_a_forward": "counts calls of a kernel",
    "tests/ops/test_logits_and_penalty.py::test_under_autocast_it_is_as_accurate_as_autograd": "the same",
    "tests/convert/test_reroute.py": "models on the CPU alone are rerouted",
    "tests/convert/test_families.py::test_a_family_is_what_it_was[transformer": "a GPU's attention has its own dropout",
}

# Left to the long list: what is written and read again, and what is traced, is the same on every device.
FILES_OF_A_RUN = (
    "tests/trainer/game/test_compiled_games.py",
    "tests/trainer/test_robustness.py::test_a_run_that_is_killed_again_and_again_reaches_the_same_bits",
    "tests/trainer/test_robustness.py::test_a_run_on_pictures_that_is_killed_again_and_again_reaches_the_same_bits",
    "tests/trainer/test_robustness.py::test_a_write_past_the_systems_limit_leaves_the_last_checkpoint",
    "tests/trainer/test_robustness.py::test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_it",
    "tests/trainer/test_robustness.py::test_an_exported_generator_is_built_again_by_the_line_that_export_prints",
)
TRACES = (
    "tests/nn/test_spectral_norm_traced.py",
    "tests/convert/test_families.py::test_a_family_is_traced_as_it_was",
)


@dataclass(frozen=True)
class Part:
    """Tests that one process runs."""

    name: str
    tests: tuple[str, ...]
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    seconds: int = 900  # wall-clock limit; the plugin limits the CPU time of each test


def _without(*tests: str) -> tuple[str, ...]:
    return tuple(f"--deselect={test}" for test in tests)


def _on_cuda(name: str, *tests: str, options: tuple[str, ...] = ()) -> Part:
    """CPU tests with cuda as their device."""
    options = "--on-cuda", *options, *_without(*ABOUT_THE_CPU)
    return Part(name, tests, options, {"SIMULATED_GPU_CPU_GENERATORS": "1"})


def _host_logic(name: str, *tests: str, later: tuple[str, ...] = ()) -> Part:
    """The same with PyTorch's operations in the place of Triton's kernels."""
    return _on_cuda(name, *tests, options=("--without-triton", *_without(*later)))


def _own(name: str, *files: str, **environment: str) -> Part:
    return Part(name, tuple(f"{OWN}/test_{file}.py" for file in files), environment=environment)


# About three minutes of the CPU, on two cores; the longest first. Tests of one environment share a process, because its
# start takes as long as hundreds of them.
SHORT = (
    Part("programs, graphs", (*(f"{OWN}/test_{file}.py" for file in PROGRAMS), *GRAPHS), ("--without-triton",)),
    Part("trainer", TRAINER, ("--without-triton", *_without(*FILES_OF_A_RUN))),
    _host_logic("host logic", "tests/nn", "tests/convert", "tests/integrations/test_func.py", PENALTIES, later=TRACES),
    _on_cuda("penalties", "tests/ops/test_logits_and_penalty.py"),
    _own("ops, rules", "ops", "rules", "refusals", "graphs"),
    _own("deferred", "deferred", SIMULATED_GPU_DEFERRED="1"),
    _own("two devices", "two_devices", SIMULATED_GPU_DEVICES="2"),
)

# By hand: as long as the interpreter takes.
LONG = (
    Part("whole trainer", ("tests/trainer",), ("--without-triton", "--test-seconds=900"), seconds=7200),
    _host_logic("traces", *TRACES),
    _on_cuda("separate penalties", "tests/ops/test_gradient_penalty.py"),
    Part("graphs", GRAPHS, ("--test-seconds=900",), seconds=7200),
    Part("gpu tests", ("tests/ops", "tests/bench", "-m", "gpu"), ("--test-seconds=900",), seconds=14400),
)
