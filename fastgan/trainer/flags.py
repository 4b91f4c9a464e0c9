"""Flags of the commands: the fields of a dataclass, read from the command line. tyro only writes the help texts.

Every error is a ValueError of one line, in the words of `settings.py`. This module does not import PyTorch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from fastgan.trainer.settings import described

Settings = TypeVar("Settings")
HELP = ("-h", "--help")


class Flag(NamedTuple):
    field: str
    kind: Any  # type of the field
    group: str | None  # field of the dataclass whose own field this is
    positional: bool
    value: bool = True  # of a flag without a value: False for --no-...


def settings(
    kind: type[Settings],
    command: str,
    about: str,
    example: str,
    arguments: Sequence[str],
    default: Settings | None = None,
) -> Settings:
    """Return a command's settings from its arguments. If they ask for the help text, print it and exit."""
    if not any(argument in HELP or argument.startswith("--tyro-") for argument in arguments):
        return parse(command, kind, arguments, default)
    hide_none(kind)
    return tyro.cli(
        kind,
        prog=f"fastgan {command}",
        description=f"{about}\n\nexample: {example}",
        default=tyro.MISSING_NONPROP if default is None else default,  # MISSING would hide the fields' own defaults
        args=list(arguments),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName),
    )


def hide_none(kind: type[Any]) -> None:
    """Annotate the fields whose default is None, so that the help text has only the comment's words on the default."""
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(base(hint)):
            hide_none(base(hint))
        elif field.default is None:
            kind.__annotations__[field.name] = Annotated[hint, tyro.conf.arg(help_behavior_hint=hint_of_default)]


def hint_of_default(label: str) -> str:
    return "" if label == "None" else f"(default: {label})"


def parse(command: str, kind: type[Settings], arguments: Sequence[str], default: Settings | None = None) -> Settings:
    """Return the settings `default`, modified by the arguments. Without `default`, fields without one are required.

    Raises:
        ValueError: a flag is unknown, or a value is missing or wrong.
    """
    flags = flags_of(kind)
    places = [flag for flag in flags.values() if flag.positional]
    values: dict[Flag, Any] = {}
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if not token.startswith("-") or token == "-":
            if not places:
                raise ValueError(f"{command} has no argument {token!r}{instead(token, flags)}")
            flag = places.pop(0)
            values[flag] = converted(flag.field, [token], flag.kind)
            continue
        name, given, text = token.partition("=")
        found = flags.get(name.replace("_", "-"))
        if found is None or found.positional:
            raise ValueError(f"{command} has no {name}{near(name, flags)}")
        if base(found.kind) is bool:
            if given:
                raise ValueError(f"{name} takes no value, got {text!r}")
            values[found] = found.value
            continue
        texts = [text] if given else []
        while len(texts) < count(found.kind) and rest and not rest[0].startswith("--"):
            texts.append(rest.pop(0))
        values[found] = converted(name, texts, found.kind)
    try:
        return built(command, kind, values, default)
    except ValueError as error:
        raise ValueError(as_flags(str(error), flags)) from None


def flags_of(kind: type[Any], group: str | None = None) -> dict[str, Flag]:
    """Return the flags of a dataclass and of its groups, by name. No two groups have a field of the same name."""
    found: dict[str, Flag] = {}
    for field, hint in get_type_hints(kind, include_extras=True).items():
        about = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        if dataclasses.is_dataclass(base(hint)):
            found |= flags_of(base(hint), field)
            continue
        named = next((item.name for item in about if getattr(item, "name", None)), field)
        others = [alias for item in about for alias in getattr(item, "aliases", None) or ()]
        flag = Flag(field, hint, group, tyro.conf.Positional in about)
        name = "--" + named.replace("_", "-")
        found |= dict.fromkeys((name, *others), flag)
        if base(hint) is bool:
            found[f"--no-{name[2:]}"] = flag._replace(value=False)
    return found


def base(hint: Any) -> Any:
    """Return a type without annotations and without None."""
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    options = tuple(option for option in options_of(kind) if option is not NoneType)
    return options[0] if len(options) == 1 else Union[options]  # noqa: UP007


def options_of(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def count(hint: Any) -> int:
    """Return how many arguments make a value of a type."""
    kind = base(hint)
    return len(get_args(kind)) if get_origin(kind) is tuple else 1


def converted(name: str, texts: Sequence[str], hint: Any) -> Any:
    """Return arguments as a value of the type, or raise ValueError."""
    kind = base(hint)
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if list(texts) == ["None"] and NoneType in options_of(plain):
        return None
    several = get_origin(kind) is tuple
    options = get_args(kind) if several else (kind,)
    if len(texts) == len(options):
        with suppress(ValueError):
            found = [one(text, option) for text, option in zip(texts, options, strict=True)]
            return tuple(found) if several else found[0]
    wanted = "a path" if kind is Path else described(kind)
    if not texts:
        raise ValueError(f"{name} needs a value: {wanted}")
    raise ValueError(f"{name} must be {wanted}, got {' '.join(texts)!r}")


def one(text: str, kind: Any) -> Any:
    """Return a text as a value of a type, or raise ValueError."""
    if get_origin(kind) is Literal:
        for option in get_args(kind):
            if str(option) == text:
                return option
        raise ValueError(text)
    for option in options_of(kind):
        with suppress(ValueError):
            if option is Path and not text:  # an unset variable of a shell, which would be the current folder
                continue
            return option(text)
    raise ValueError(text)


def built(command: str, kind: type[Settings], values: Mapping[Flag, Any], default: Settings | None) -> Settings:
    """Return `default`, or the dataclass' own defaults, with other values."""
    own = {flag.field: value for flag, value in values.items() if flag.group is None}
    for field in required(kind):
        if default is None and field not in own:
            raise ValueError(f"{command} needs {field.upper()}: fastgan {command} --help describes it")
    groups: dict[str, dict[str, Any]] = {}
    for flag, value in values.items():
        if flag.group is not None:
            groups.setdefault(flag.group, {})[flag.field] = value
    kinds = get_type_hints(kind)
    for group, changed in groups.items():
        start = base(kinds[group])() if default is None else getattr(default, group)
        own[group] = dataclasses.replace(start, **changed)
    return kind(**own) if default is None else dataclasses.replace(default, **own)  # type: ignore[type-var]


def as_flags(message: str, flags: Mapping[str, Flag]) -> str:
    """Return an error's message with the fields that it is about, alone or in lists, spelled as flags."""
    names = {about.field: name for name, about in reversed([*flags.items()]) if about.value and not about.positional}
    field = rf"(?:{'|'.join(names)})"
    lists = rf"(?:^|(?<=: )|(?<=leave out )|(?<=needs )|(?<=set )|(?<=choose )){field}\b(?:(?:, | and | or ){field}\b)*"
    return re.sub(lists, lambda found: re.sub(rf"\b{field}\b", lambda one: names[one[0]], found[0]), message)


def required(kind: type[Any]) -> Iterator[str]:
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            yield field.name


def near(name: str, flags: Mapping[str, Flag]) -> str:
    known = [flag[2:] for flag, about in flags.items() if about.value and not about.positional]
    found = get_close_matches(name.lstrip("-").replace("_", "-").lower(), known, 1, 0.6)
    return f": did you mean --{found[0]}?" if found else ": --help lists the flags"


def instead(token: str, flags: Mapping[str, Flag]) -> str:
    """Say how a path that is no argument is given."""
    if "--data" in flags and Path(token).exists():
        return f": did you mean --data {token}?"
    return ": flags start with --"
