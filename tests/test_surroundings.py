"""Processes without a home or with a terminal that isn't UTF-8, imports that fail halfway, numbers that JSON lacks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fastgan import cli, strict_json

ROOT = Path(__file__).resolve().parent.parent


def run(code, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


def test_a_user_without_a_home_keeps_the_cache_in_a_folder_for_temporary_files(tmp_path):
    run(
        """
        import os
        import pwd
        from pathlib import Path
        def nobody(uid):
            raise KeyError(uid)
        pwd.getpwuid = nobody  # as in a container that runs as a user without an entry
        import fastgan
        from fastgan.trainer.data.cache import cache_folder, kept
        try:
            Path.home()
        except RuntimeError:
            pass
        else:
            raise AssertionError("there is a home")
        assert cache_folder().parent.samefile(os.environ["TMPDIR"]), cache_folder()
        assert bytes(kept(cache_folder() / "file", lambda: [b"abc"])) == b"abc"
        """,
        TMPDIR=str(tmp_path),
    )


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp1252", marks=pytest.mark.long)])
def test_a_stdout_that_is_not_utf8_gets_question_marks(encoding):
    out = run(
        """
        import sys
        from fastgan import cli
        cli.COMMANDS["info"] = lambda arguments: print("a ± b, λ × 2") or 0
        sys.exit(cli.main(["info"]))
        """,
        PYTHONIOENCODING=encoding,
    )
    assert out == "a ± b, λ × 2\n".encode(encoding, errors="replace")


def test_a_replaced_stdout_is_left_alone(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fastgan")


REPEATED = """
    import importlib, sys
    import torch

    class Fails:
        def find_spec(self, name, path=None, target=None):
            if name == {failing!r}:
                raise ImportError("interrupted")

    sys.meta_path.insert(0, Fails())
    try:
        import fastgan
    except ImportError:
        pass
    else:
        raise AssertionError("the import went through")
    sys.meta_path.pop(0)
    for name in [name for name in sys.modules if name.startswith({forgotten!r})]:
        del sys.modules[name]
    import fastgan
    x = torch.randn(4, 6, 40, 40, requires_grad=True)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {{}}))

    want = fastgan.ops.group_norm(x, 2, backend="reference")
    with Watched():  # through the operators
        got = fastgan.ops.group_norm(x, 2, backend="cpu")
    assert torch.allclose(got, want, atol=1e-5)
    model = torch.nn.Sequential(torch.nn.Conv2d(6, 4, 3), torch.nn.GroupNorm(2, 4))
    fastgan.gradient_penalty(model, x.detach(), kind="r1").backward()
"""


@pytest.mark.parametrize(
    ("failing", "forgotten"),
    [
        ("fastgan.ops.pool", "fastgan"),
        *(pytest.param("fastgan.convert", name, marks=pytest.mark.long) for name in ("no module", "fastgan")),
        pytest.param("fastgan.ops.pool", "no module", marks=pytest.mark.long),
    ],
)
def test_a_second_import_after_one_that_failed(failing, forgotten):
    run(REPEATED.format(failing=failing, forgotten=forgotten))


def test_an_import_that_fails_after_its_operators_were_defined():
    run(
        """
        import sys
        import torch
        import fastgan
        for name in [name for name in sys.modules if name.startswith("fastgan.ops.norm")]:
            del sys.modules[name]
        import fastgan.ops.norm.autograd as again
        x = torch.randn(4, 6, 40, 40)
        from fastgan.ops import norm
        assert torch.allclose(norm.group_norm(x, 2), torch.nn.functional.group_norm(x, 2), atol=1e-5)
        """
    )


def test_numbers_that_json_lacks_are_strings_and_come_back():
    value = {"loss": math.nan, "steps": [math.inf, -math.inf, 1.5, {"name": "NaN-like", "none": None}], "ok": True}
    text = strict_json.dumps(value)

    def refused(constant):
        raise AssertionError(f"{constant} is no JSON")

    plain = json.loads(text, parse_constant=refused)
    assert plain["loss"] == "NaN"
    assert plain["steps"][:3] == ["Infinity", "-Infinity", 1.5]
    back = strict_json.loads(text)
    assert math.isnan(back["loss"])
    assert back["steps"] == value["steps"]


def test_a_record_of_a_run_and_of_the_benchmark_is_json_whatever_was_measured(tmp_path):
    from fastgan.bench import record
    from fastgan.trainer.config import TrainConfig
    from fastgan.trainer.run import RunFolder

    folder = RunFolder(TrainConfig("ring8", runs=tmp_path))
    folder.path.mkdir()
    folder.append_metrics({"step": 1, "loss": math.nan, "penalty": math.inf})
    json.loads(folder.metrics.read_text(), parse_constant=pytest.fail)
    assert math.isnan(folder.read_metrics()[0]["loss"])
    folder.forget_after(1)
    json.loads(folder.metrics.read_text(), parse_constant=pytest.fail)
    record.save({"schema": record.SCHEMA, "cases": [{"ratio": math.nan}]}, tmp_path / "results.json")
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert math.isnan(record.load(tmp_path / "results.json")["cases"][0]["ratio"])
