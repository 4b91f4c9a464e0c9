"""The docstring of each public name has an example that runs, an entry for each parameter, orders and errors."""

from __future__ import annotations

import inspect
import re

import pytest

import fastgan

PUBLIC = {
    f"{namespace.__name__}.{name}": getattr(namespace, name)
    for namespace in (fastgan.ops, fastgan.nn, fastgan.nn.utils)
    for name in namespace.__all__
    if not inspect.ismodule(getattr(namespace, name))
} | {f"fastgan.{name}": getattr(fastgan, name) for name in fastgan.__all__ if callable(getattr(fastgan, name))}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_of_a_docstring_runs(name):
    examples = re.findall(r"```python\n(.*?)```", inspect.getdoc(PUBLIC[name]) or "", flags=re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, name, "exec"), {})


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - {"fastgan.BackendUnavailable"}))
def test_each_parameter_has_an_entry_in_the_docstring(name):
    section = re.search(r"^Args:\n(.*?)(?:^\S|\Z)", inspect.getdoc(PUBLIC[name]) or "", flags=re.DOTALL | re.MULTILINE)
    entries = re.findall(r"^    (\S.*?):", section[1], flags=re.MULTILINE) if section else []
    documented = [argument for entry in entries for argument in entry.split(", ")]
    assert documented == list(inspect.signature(PUBLIC[name]).parameters)


OPERATIONS = [name for name in PUBLIC if name.startswith(("fastgan.ops.", "fastgan.nn.")) and "state_dict" not in name]


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_docstring_states_the_order_of_derivative_and_the_errors(name):
    docstring = inspect.getdoc(PUBLIC[name]) or ""
    assert re.search(r"^Order of derivative: ", docstring, flags=re.MULTILINE)
    assert re.search(r"^Raises:\n    \w+(, \w+)*: ", docstring, flags=re.MULTILINE)


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_in_docstrings_fit_in_88_columns(name):
    examples = re.findall(r"```python\n(.*?)```", inspect.getdoc(PUBLIC[name]) or "", flags=re.DOTALL)
    assert max(len(line) for example in examples for line in example.splitlines()) <= 88
