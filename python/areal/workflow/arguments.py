"""Arguments that a configuration gives to a class of its user's, or of ours: plain values, compared with the types that it names."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError

from areal.config import ConfigError

_PLAIN = (int, float, bool, str, type(None))


def check_arguments(made: Any, given: Mapping[str, Any], key: str) -> None:
    """``ConfigError`` naming ``key.argument`` for a value that the annotation of its parameter does not allow.

    Only annotations of numbers, texts, flags, ``Literal`` and None, alone or in a union, and sections of the configuration are looked at;
    None is fine where it is the default. What is no class takes no arguments, and is not looked at.
    """
    if not isinstance(made, type):
        return
    try:
        hints, parameters = get_type_hints(made.__init__), inspect.signature(made).parameters  # type: ignore[misc]
    except (NameError, TypeError, ValueError):  # names that only a type checker imports; a class of C
        return
    for name, value in given.items():
        hint = hints.get(name)
        default = parameters[name].default if name in parameters else None
        if hint is None or (value is None and default is None) or _allows(hint, value):
            continue
        raise ConfigError(
            f"{key}.{name} is {_short(value)}, but {made.__name__} takes {inspect.formatannotation(hint)}",
            f"leave it out: the keys of {name} are the run's" if _is_section(hint) else f"correct {key}.{name}",
        )


def _allows(hint: Any, value: Any) -> bool:
    if _is_section(hint):
        return isinstance(value, hint)
    if not _is_plain(hint):
        return True
    try:
        TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _is_plain(hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return all(map(_is_plain, get_args(hint)))
    return hint in _PLAIN or get_origin(hint) is Literal


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, BaseModel)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
