from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from fastgan import cli
from fastgan.bench import measure, timing, user_model
from fastgan.bench.case import BASELINE, prepare

CPU = torch.device("cpu")
MODULE = """
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm


def build():
    return nn.Sequential(
        spectral_norm(nn.Conv2d(3, 4, 4, 2, 1)), nn.LeakyReLU(0.2), nn.Dropout(0.5),
        nn.Flatten(), spectral_norm(nn.Linear(4 * 4 * 4, 1)),
    )


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.features, self.head = nn.Embedding(5, 8), nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x, y):
        h = torch.relu(self.features(x))
        return self.head(h) + (self.embed(y) * h).sum(1, keepdim=True)


class NeedsWidth(nn.Module):
    def __init__(self, width):
        super().__init__()


def raises():
    raise KeyError("weights")


class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(12, 1))


instance = Plain()
pair = Plain(), torch.zeros(3, 3, 2, 2)


def with_labels():
    return Conditional(), (torch.randn(7, 6), torch.arange(7) % 5)


def noisy():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x * torch.rand_like(x))

    return Noisy(6, 1), torch.randn(4, 6)


lazy = lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(1))


def not_finite():
    model = nn.Linear(6, 1)
    nn.init.constant_(model.weight, float("nan"))
    return model, torch.randn(4, 6)


number = 3
integer = lambda: 3
words = lambda: (nn.Linear(6, 1), "six")
pairs = lambda: (Pair(), torch.randn(4, 6))
frozen = lambda: (nn.Flatten(), torch.randn(4, 6))
deaf = lambda: (Deaf(), torch.randn(4, 6))

detached = lambda: (Detached(), torch.randn(4, 6))
all_frozen = lambda: (nn.Linear(6, 1).requires_grad_(False), torch.randn(4, 6))
aside = lambda: (Aside(), torch.randn(4, 6))


def partly_frozen():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1))
    model[0].requires_grad_(False)
    return model, torch.randn(4, 6)


class Pair(nn.Linear):
    def __init__(self):
        super().__init__(6, 1)

    def forward(self, x):
        return super().forward(x), x


class Deaf(Pair):
    def forward(self, x):
        return self.weight.detach().sum()


class Detached(Deaf):
    def forward(self, x):
        return nn.Linear.forward(self, x.detach())


class Aside(Deaf):
    def forward(self, x):
        return x.sum(1)
"""


@pytest.fixture(autouse=True)
def in_a_folder_with_the_module(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def build(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "my_module", raising=False)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device, timer: 1e9)
    monkeypatch.setattr(timing, "matmul_rate", lambda device, timer: 1e9)
    monkeypatch.setitem(measure.SAMPLE_SECONDS, "cpu", 1e-3)


def bench(*arguments):
    return cli.main(["bench", "--device", "cpu", "--rounds", "1", "--output", "out.json", "--model", *arguments])


def test_three_steps_of_a_model_are_timed_after_the_conversion_is_told(tmp_path, capsys):
    assert bench("my_module:build", "--input", "3,8,8", "--batch", "5") == 0
    out = capsys.readouterr().out
    assert "2 replaced, 4 unchanged" in out
    assert "equal up to rounding" in out
    assert "R1: one pass" in out
    assert "1 dropout layers are off" in out
    found = json.loads((tmp_path / "out.json").read_text())
    assert [case["name"] for case in found["cases"]] == [f"{name}, 5x3x8x8" for name in ("no penalty", "R1", "WGAN-GP")]
    for case in found["cases"]:
        assert list(case["variants"]) == [BASELINE, "fastgan"]
        assert f"| {case['name']} | fastgan |" in out
    command = "fastgan bench --model my_module:build --device cpu --rounds 1 --input 3,8,8 --batch 5"
    assert found["provenance"]["command"] == command
    assert cli.main(["bench", "--resume", "out.json"]) == 2
    assert "out.json has suite model, which cannot be resumed" in capsys.readouterr().err


def test_further_inputs_such_as_labels_are_the_examples(capsys):
    assert bench("my_module:with_labels") == 0
    assert "| R1, 7x6 | fastgan |" in capsys.readouterr().out


def test_what_the_user_froze_stays_frozen(capsys):
    model, _ = user_model.load("my_module:partly_frozen", None, None, CPU)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["2.weight", "2.bias"]
    assert bench("my_module:partly_frozen") == 0
    assert "| WGAN-GP, 4x6 | fastgan |" in capsys.readouterr().out


def test_the_models_of_all_variants_are_the_users_and_stay_apart():
    layer = spectral_norm(nn.Linear(6, 1))
    u = layer.parametrizations.weight[0]._u.clone()
    for case in user_model.cases(layer, torch.randn(4, 6)):
        _, errors, _ = prepare(case, CPU)
        assert errors["fastgan"] <= 1e-3
    assert torch.equal(u, layer.parametrizations.weight[0]._u)
    assert type(layer).__module__ != "fastgan"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["my_module"], "--model must be MODULE:NAME, such as my_module:build, got 'my_module'"),
        (["no_module:build"], "--model no_module:build: no module 'no_module' in this folder or on PYTHONPATH"),
        (["my_module:nothing"], "--model my_module:nothing: my_module has no module, class or function 'nothing'"),
        (["my_module:number"], "--model my_module:number: my_module has no module, class or function 'number'"),
        (["my_module:integer"], "must return a torch.nn.Module or (module, example_input), got int"),
        (["my_module:NeedsWidth"], "--model my_module:NeedsWidth failed when called without arguments (TypeError: "),
        (["my_module:raises"], "--model my_module:raises failed when called without arguments (KeyError: 'weights')"),
        (["broken:build"], "--model broken:build: broken cannot be imported (SyntaxError: "),
        (["my_module:words"], "the example input of my_module:words must start with a tensor, got str"),
        (["my_module:build"], "returns no example input: pass the shape of one sample, such as --input 3,64,64"),
        (["my_module:pairs", "--batch", "3"], "leave out --input and --batch"),
        (["my_module:build", "--input", "4,8,8"], "does not accept an input of shape (16, 4, 8, 8): RuntimeError: "),
        (["my_module:pairs"], "the model of my_module:pairs must return a tensor of logits, got tuple"),
        (
            ["my_module:frozen"],
            "my_module:frozen returns a model without floating-point parameters: there is nothing to train",
        ),
        (["my_module:deaf"], "the output of the model of my_module:deaf does not depend on its input"),
        (["my_module:detached"], "the output of the model of my_module:detached does not depend on its input"),
        (["my_module:aside"], "the output of the model of my_module:aside depends on no trainable parameter"),
        (["my_module:all_frozen"], "returns a model with only frozen parameters: there is nothing to train"),
        (["my_module:noisy"], "fastgan differs from torch by"),
        (["my_module:not_finite"], "torch returns values that are not finite"),
        (["my_module:build", "--suite", "ops"], "--model defines its own cases: leave out --suite and --case"),
    ],
)
def test_a_model_that_cannot_be_benched_is_refused_in_one_line(arguments, message, capsys):
    assert bench(*arguments) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("fastgan: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in error


def test_a_lazy_model_is_timed_with_the_parameters_that_its_first_forward_makes(capsys):
    assert bench("my_module:lazy", "--input", "3,8,8", "--batch", "2", "--minutes", "0") == 0
    model, _ = user_model.load("my_module:lazy", (3, 8, 8), 2, CPU)
    assert [tuple(p.shape) for p in model.parameters()] == [(1, 192), (1,)]


@pytest.mark.parametrize("name", ["Plain", "instance", "pair"])
def test_classes_instances_and_pairs_are_benched_like_what_functions_return(name):
    example = name == "pair"
    model, x = user_model.load(f"my_module:{name}", None if example else (3, 2, 2), None if example else 3, CPU)
    assert type(model).__name__ == "Plain"
    assert x.shape == (3, 3, 2, 2)


def test_a_shape_is_numbers_between_commas(capsys):
    with pytest.raises(SystemExit):
        bench("my_module:build", "--input", "3,x")
    assert "must be positive sizes, such as 3,64,64, got '3,x'" in capsys.readouterr().err
