"""Settings in JSON files: their names, their types, and files that contain only some of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "text", NoneType: "null"}


def read_table(path: Path) -> dict[str, Any]:
    """Return the settings in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or has a setting twice.
        TypeError: it is not a table.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=table)
    except UnicodeDecodeError:
        raise ValueError("it is not a text file in UTF-8") from None
    except RecursionError:
        raise ValueError("its tables are nested too deeply") from None
    if not isinstance(values, dict):
        raise TypeError("it is not a table of settings")
    return values


def table(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return a table of a JSON file. JSON itself would silently keep the last one of equal names."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is set twice, to {found[name]!r} and to {value!r}")
        found[name] = value
    return found


def checked(kind: type[Any], values: Mapping[str, Any], known: tuple[type[Any], ...]) -> dict[str, Any]:
    """Return a file's settings for the dataclass `kind`, in the types of its fields.

    Args:
        known: dataclasses, one of whose settings an unknown name may mean.

    Raises:
        ValueError: a name is unknown or a value has another type. The message names the setting that is meant, or what
            the value must be.
    """
    hints = get_type_hints(kind, include_extras=True)
    own = [field.name for field in dataclasses.fields(kind)]
    for name in values:
        if name not in own:
            names = own + [field.name for other in known for field in dataclasses.fields(other)]
            if name in names:
                raise ValueError(f"{name} does not belong to this table: set it outside of the tables")
            near = get_close_matches(name, names, 1, 0.5)
            raise ValueError(f"no setting {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    return {name: converted(name, value, hints[name]) for name, value in values.items()}


def converted(name: str, value: Any, wanted: Any) -> Any:
    """Return a value of a JSON file in the type of its field, or raise ValueError."""
    kind, options = get_origin(wanted), get_args(wanted)
    if kind is Annotated:
        return converted(name, value, options[0])
    if kind in (Union, UnionType):
        for option in options:
            try:
                return converted(name, value, option)
            except ValueError:  # noqa: PERF203
                continue
    elif kind is Literal:
        if any(type(value) is type(option) and value == option for option in options):
            return value
    elif kind is tuple:
        if isinstance(value, list | tuple) and len(value) == len(options):
            return tuple(converted(name, part, option) for part, option in zip(value, options, strict=True))
    elif wanted is Path and isinstance(value, str | Path):
        return Path(value)
    elif type(value) is wanted or (wanted is float and type(value) is int):
        return value
    raise ValueError(f"{name} must be {described(wanted)}, got {value!r}")


def described(wanted: Any) -> str:
    """Say in words which values a type has."""
    kind, options = get_origin(wanted), get_args(wanted)
    if kind is Annotated:
        return described(options[0])
    if kind in (Union, UnionType):
        return " or ".join(map(described, options))
    if kind is Literal:
        return f"one of {', '.join(map(str, options))}"
    if kind is tuple:
        return f"a list of {len(options)} values, each {described(options[0])}"
    return WORDS.get(wanted, "a table of settings")


def merged(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with other values. Those of a group may stand in the group or outside of all groups.

    Raises:
        TypeError: a group is not a table.
        ValueError: a setting stands in its group and outside of it.
    """
    groups = {key: dict(value) for key, value in base.items() if isinstance(value, dict)}
    found = dict(base)
    for key, value in values.items():
        if key in groups:
            if not isinstance(value, dict):
                raise TypeError(f"{key} must be a table of settings, got {value!r}")
            groups[key].update(value)
            continue
        for name, group in groups.items():
            if key in group and key not in base:
                own = values.get(name)
                if isinstance(own, dict) and key in own:
                    raise ValueError(f"{key} is set twice, in {name} and outside of it")
                group[key] = value
                break
        else:
            found[key] = value
    return found | groups


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings outside of their groups. No two groups have a setting of the same name."""
    groups = {key: value for key, value in values.items() if isinstance(value, dict)}
    return {key: value for key, value in values.items() if key not in groups} | {
        key: value for group in groups.values() for key, value in group.items()
    }
