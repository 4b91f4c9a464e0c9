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


@pytest.mark.parametrize("first", ["import", "patch"])
def test_a_plugin_that_only_replaced_functions_use_is_not_compiled(first, caplog):
    """Some networks call _init() at their import, where StyleGAN's functions compile their extensions."""
    compiled = []
    plugins = "def get_plugin(module_name, sources, **named):\n    compiled.append(module_name)\n    return Plugin()"
    init = """
import sys
def init():
    return sys.modules["project.torch_utils.custom_ops"].get_plugin("{0}", sources=[])
def {0}(a, b, c{1}): return None
"""

    def load():
        custom = made("project.torch_utils.custom_ops", plugins)
        custom.compiled, custom.Plugin = compiled, types.SimpleNamespace
        made("project.torch_utils.ops.fma", init.format("fma", ""))
        made("project.style_ops.fma", init.format("fma", "=None"))

    if first == "import":
        load()
    patch = fastgan.patch_torch_utils()
    if first == "patch":
        load()
        fastgan.patch_torch_utils()
    plugin = imported("project.torch_utils.ops.fma").init()
    assert not compiled
    with pytest.raises(AttributeError):
        plugin.kernel  # noqa: B018
    assert compiled == ["fma"]
    imported("project.style_ops.fma").init()  # its fma is not replaced and may need the plugin
    assert compiled == ["fma", "fma"]
    patch.restore()
    imported("project.torch_utils.ops.fma").init()
    assert compiled == ["fma", "fma", "fma"]


def test_a_library_that_registers_operators_is_compiled_at_the_import(monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(cpp_extension, "load", lambda name, *args, **named: compiled.append(name))
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "__init__.py").write_text("")
    (tmp_path / "project" / "op").mkdir()
    (tmp_path / "project" / "op" / "__init__.py").write_text("")
    (tmp_path / "project" / "op" / "fused_act.py").write_text(
        "from torch.utils.cpp_extension import load\n"
        "load('operators', [], is_python_module=False)\n"
        "extension = load('module', [])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    fastgan.patch_torch_utils()
    imported("project.op.fused_act")
    assert compiled == ["operators"]


def test_a_loader_that_is_used_again_after_a_restore_loads_the_originals(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        for name in ("fma", "bias_act"):
            archive.writestr(f"project/style_ops/{name}.py", "def fma(a, b, c): return None")
    for name in ("project", "project.style_ops"):
        package = made(name, "")
        package.__path__ = [str(tmp_path / "archive.zip" / name.replace(".", "/"))]
    patch = fastgan.patch_torch_utils()
    assert is_ours(imported("project.style_ops.fma").fma)
    patch.restore()
    assert not is_ours(importlib.reload(imported("project.style_ops.fma")).fma)


def test_with_fastgan_off_nothing_is_replaced(monkeypatch):
    monkeypatch.setenv("FASTGAN", "off")
    networks = imported("networks")
    patch = fastgan.patch_torch_utils()
    assert patch.replaced == []
    assert not is_ours(networks.bias_act.bias_act)
    patch.restore()
    assert not is_ours(imported("project.torch_utils.ops.bias_act").bias_act)


COPIES = """
from .torch_utils import ops
from .torch_utils.ops import bias_act as act
import {0}.torch_utils.ops.fma as fused

class Layer:
    from .torch_utils.ops.fma import fma as multiply

def run(x):
    return fused.fma(x, x, x) + ops.bias_act.bias_act(x) + Layer.multiply(x, x, x)
"""
ACTS = ("relu", "lrelu")


@pytest.mark.parametrize("first", ["import", "patch"])
def test_copies_of_the_package_keep_apart(first, monkeypatch, tmp_path):
    copies = [f"project{i}" for i in range(2)]
    for i, copy in enumerate(copies):
        folder = tmp_path / copy / "torch_utils" / "ops"
        folder.mkdir(parents=True)
        for parent in (folder, folder.parent, folder.parent.parent):
            (parent / "__init__.py").write_text("")
        (folder / "fma.py").write_text(f"def fma(a, b, c): return {i} + a * b + c")
        (folder / "bias_act.py").write_text(f"def bias_act(x, b=None, dim=1, act='{ACTS[i]}'): return {i}")
        (tmp_path / copy / "net.py").write_text(COPIES.format(copy))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        nets = [imported(f"{copy}.net") for copy in copies] if first == "import" else []
        patch = fastgan.patch_torch_utils()
        nets = nets or [imported(f"{copy}.net") for copy in copies]
        for i, net in enumerate(nets):
            assert is_ours(net.fused.fma)
            by_layer = X * X + X + (i if first == "import" else 0)  # it was stored in a class before
            want = X * X + X + F.leaky_relu(X, 0.2 * i) * 2**0.5 + by_layer
            torch.testing.assert_close(net.run(X), want)
        patch.restore()
        assert [net.fused.fma(1, 2, 3) for net in nets] == [5, 6]
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in copies]:
            del sys.modules[name]
