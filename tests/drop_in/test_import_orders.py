"""What is replaced, and restored, by the order and the ways in which modules are imported."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import pickle
import sys
import types
import zipfile

import pytest
import torch
from torch.nn import functional as F
from torch.utils import cpp_extension

import fastgan
from tests.drop_in.stand_in import imported, is_ours
from tests.harness import assert_close

X = torch.randn(2, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_an_extension_is_compiled_late_if_a_function_that_is_not_replaced_uses_it(monkeypatch):
    compiled = []
    extension = types.SimpleNamespace(fused_bias_act=lambda *args: args[0] + 1)
    monkeypatch.setattr(cpp_extension, "load", lambda *args, **named: compiled.append(args) or extension)
    patch = fastgan.patch_torch_utils()
    op = imported("op")
    assert not hasattr(sys.modules["op.fused_act"].extension, "__path__")
    op.fused_leaky_relu(X)
    assert not compiled
    patch.restore()
    assert op.fused_leaky_relu(1) == op.fused_leaky_relu(1) == 2
    assert compiled == [("fused",)]


def made(name, text):
    """A module that is made without an import."""
    module = sys.modules[name] = types.ModuleType(name)
    exec(text, vars(module))
    return module


SCALED = "def fused_leaky_relu(input, bias=None, negative_slope=0.1, scale=3): return None"


def test_a_further_call_finds_what_was_made_without_an_import_and_keeps_its_defaults():
    fastgan.patch_torch_utils()
    module = made("project.op.fused_act", SCALED)
    assert module.fused_leaky_relu(X) is None
    fastgan.patch_torch_utils()
    torch.testing.assert_close(module.fused_leaky_relu(X), F.leaky_relu(X, 0.1) * 3)
    torch.testing.assert_close(module.fused_leaky_relu(X, None, 0.5, scale=1), F.leaky_relu(X, 0.5))


@pytest.mark.parametrize(
    "text",
    [
        "def fma(a, b, c=None): return None",
        "def fma(*args): return None",
        "def fma(*args, **named): return None",
        "def fma(a, c, b): return None",
    ],
)
def test_a_function_that_may_mean_something_else_is_left_alone(text, caplog):
    module = made("project.torch_utils.ops.fma", text)
    for _ in range(2):
        fastgan.patch_torch_utils()
    assert not is_ours(module.fma)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("name", ["project.style_ops.fma", "project.stylegan3.ops.fma", "torch_utils.ops.fma"])
def test_other_code_bases_names_of_the_package_are_known(name):
    module = made(name, "def fma(a, b, c): return None")
    fastgan.patch_torch_utils()
    assert is_ours(module.fma)


def test_a_pickled_reference_does_not_depend_on_fastgan():
    patch = fastgan.patch_torch_utils()
    module = imported("torch_utils.ops.upfirdn2d")
    data = pickle.dumps(functools.partial(module.upsample2d, up=4))
    assert b"fastgan" not in data
    patch.restore()
    assert pickle.loads(data).func is module.upsample2d
    assert not is_ours(module.upsample2d)


def test_a_function_that_was_imported_by_name_afterwards_is_restored_too():
    patch = fastgan.patch_torch_utils()
    networks = imported("networks")
    assert is_ours(networks.filtered_lrelu)
    assert "networks.filtered_lrelu" in patch.replaced
    patch.pause(True)
    assert not is_ours(networks.filtered_lrelu)
    patch.pause(False)
    patch.restore()
    assert networks.filtered_lrelu is imported("torch_utils.ops.filtered_lrelu").filtered_lrelu
    assert not is_ours(networks.filtered_lrelu)


def test_modules_of_an_archive_share_a_loader(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("project/style_ops/fma.py", "def fma(a, b, c): return None")
        archive.writestr("project/style_ops/upfirdn2d.py", "def upfirdn2d(x, f): pass\ndef fma(a, b): return 5")
    for name in ("project", "project.style_ops"):
        package = made(name, "")
        package.__path__ = [str(tmp_path / "archive.zip" / name.replace(".", "/"))]
    fastgan.patch_torch_utils()
    assert is_ours(imported("project.style_ops.fma").fma)
    module = imported("project.style_ops.upfirdn2d")
    assert is_ours(module.upfirdn2d)
    assert module.fma(1, 2) == 5


def test_restoring_puts_the_originals_back():
    networks = imported("networks")
    original = networks.bias_act.bias_act, networks.filtered_lrelu
    patch = fastgan.patch_torch_utils()
    assert fastgan.patch_torch_utils() is patch
    patch.restore()
    assert (networks.bias_act.bias_act, networks.filtered_lrelu) == original
    assert patch.replaced == []
    assert patch not in sys.meta_path
    assert not is_ours(imported("torch_utils.ops.fma").fma)


def test_the_source_of_a_patched_module_can_be_read():
    fastgan.patch_torch_utils()
    module = imported("torch_utils.ops.bias_act")
    assert "ACTIVATIONS" in inspect.getsource(module)
    assert is_ours(importlib.reload(module).bias_act)


def test_a_module_that_is_not_there_is_still_an_import_error():
    fastgan.patch_torch_utils()
    with pytest.raises(ModuleNotFoundError):
        imported("project.torch_utils.ops.upfirdn2d")


def test_inside_of_a_package_the_modules_are_found_and_unknown_parameters_left_alone(caplog):
    fastgan.patch_torch_utils()
    assert is_ours(imported("project.torch_utils.ops.bias_act").bias_act)
    with caplog.at_level(logging.WARNING, "fastgan"):
        fma = imported("project.torch_utils.ops.fma").fma
    assert "its parameters differ" in caplog.text
    assert fma(torch.tensor(1.26), 1, 0, 1).item() == pytest.approx(1.3)


def test_a_pause_puts_the_originals_back_for_a_while():
    networks = imported("networks")
    original = networks.bias_act.bias_act
    patch = fastgan.patch_torch_utils()
    patch.pause(True)
    assert networks.bias_act.bias_act is original
    later = imported("project.torch_utils.ops.bias_act")
    assert not is_ours(later.bias_act)
    patch.pause(False)
    assert is_ours(networks.bias_act.bias_act)
    assert is_ours(later.bias_act)
    patch.pause(True)
    patch.restore()
    assert networks.bias_act.bias_act is original


PICKLED = """
from torch_utils.ops import upfirdn2d
from torch_utils.ops.bias_act import bias_act

def forward(x):
    return bias_act(upfirdn2d.upfirdn2d(x, None), act="lrelu")
"""


@pytest.mark.parametrize("first", ["load", "patch"])
def test_a_module_that_is_made_from_the_source_in_a_pickle_gets_them(first):
    """As persistence classes are: their module has a name of its own, and its source came with the pickle."""
    name = "_imported_module_1234"
    module = sys.modules[name] = types.ModuleType(name)
    try:
        if first == "patch":
            fastgan.patch_torch_utils()
        exec(PICKLED, vars(module))
        if first == "load":
            fastgan.patch_torch_utils()
        assert is_ours(module.bias_act)
        assert is_ours(module.upfirdn2d.upfirdn2d)
        assert_close(module.forward(X), F.leaky_relu(X, 0.2) * 2**0.5, order=0)
    finally:
        del sys.modules[name]
