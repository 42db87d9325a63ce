"""From a YAML file and ``key=value`` overrides to a checked configuration; every mistake is one ``ConfigError``."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from areal.config import ConfigError, GRPOConfig
from areal.config_check import check_config

ConfigT = TypeVar("ConfigT", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: ``1e-5`` is a number, a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is given twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_expr_config(
    argv: Sequence[str],
    config_class: type[ConfigT] = GRPOConfig,  # type: ignore[assignment]
    check: Callable[[GRPOConfig], None] = check_config,
) -> tuple[ConfigT, str]:
    """``["--config", "x.yaml", "actor.eps_clip=0.3", ...]`` (or the path alone in front) -> (configuration, path of the file).

    ``check`` looks for combinations of keys that are impossible; another command has another one. Raises ``ConfigError``: one sentence for a
    missing or malformed file, an unknown key, a wrong type, an impossible combination.
    """
    path, overrides = _split_argv(argv)
    tree = read_yaml(path)
    for override in overrides:
        apply_override(tree, override, config_class)
    config = build_config(tree, config_class, source=path)
    if isinstance(config, GRPOConfig):
        check(config)
    return config, path


def _split_argv(argv: Sequence[str]) -> tuple[str, list[str]]:
    path, overrides, words = "", [], iter(argv)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            value = word.partition("=")[2] if "=" in word else next(words, "")
        elif word.startswith("-"):
            raise ConfigError(f"unknown option '{word}'", "give a YAML file and then key=value overrides")
        elif "=" in word and not Path(word).is_file():
            overrides.append(word)
            continue
        elif not path:
            value = word
        else:
            raise ConfigError(f"'{word}' is not an override", f"write it as key=value, e.g. {word}=...")
        if path:
            raise ConfigError(
                f"two configuration files were given, '{path}' and '{value}'", "one run has one file; change keys with key=value"
            )
        path = value
    if not path:
        raise ConfigError("no configuration file was given", "e.g. examples/arithmetic.yaml, or --config FILE")
    return path, overrides


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"the configuration file '{path}' does not exist", _near_files(Path(path))) from None
    except IsADirectoryError:
        raise ConfigError(f"'{path}' is a folder, not a configuration file", _near_files(Path(path) / "x")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file '{path}' cannot be read: {error}") from None
    tree = _parse_yaml(text, str(path))
    if tree is None:
        raise ConfigError(f"the configuration file '{path}' is empty", "it needs at least 'actor' and 'train_dataset'; see examples/")
    if not isinstance(tree, dict):
        raise ConfigError(f"'{path}' holds {_kind(tree)} instead of keys", "write 'key: value' lines; see examples/")
    return tree


def _near_files(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder '{folder}' either; run from the folder that the path is relative to"
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml"))
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{folder / near[0]}'?"
    return f"the YAML files in '{folder}' are {', '.join(names)}" if names else f"there is no YAML file in '{folder}'"


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}", _yaml_hint(text, mark)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def _yaml_hint(text: str, mark: yaml.Mark | None) -> str:
    lines = text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    if "\t" in line:
        return "indent with spaces, not tabs"
    return f"the line is '{line.strip()}'" if line.strip() else ""


def apply_override(tree: dict[str, Any], override: str, config_class: type[BaseModel] = GRPOConfig) -> None:
    """``a.b=value`` into the tree; the value is YAML, except that keys of text keep what was typed."""
    key, equals, raw = override.partition("=")
    parts = key.split(".")
    if not equals or not all(re.fullmatch(r"[A-Za-z_][\w-]*", part) for part in parts):
        raise ConfigError(f"the override '{override}' is not key=value", "e.g. rollout.max_head_offpolicyness=4")
    value: Any = _parse_yaml(raw, f"the override '{override}'")
    if _field_type(config_class, parts) is str and not isinstance(value, str):
        value = raw
    node = tree
    for depth, part in enumerate(parts[:-1]):
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            section = ".".join(parts[: depth + 1])
            raise ConfigError(f"the override '{override}' reaches into '{section}', which is {_kind(child)}", f"set it as {section}=...")
        node = child
    node[parts[-1]] = value


def build_config(tree: Mapping[str, Any], config_class: type[ConfigT], source: str = "the configuration") -> ConfigT:
    """Validates a tree of plain values; pydantic's first error becomes one sentence."""
    try:
        return config_class.model_validate(dict(tree))
    except ValidationError as failure:
        # An unknown key is often the cause of a missing one: tell it first.
        errors = sorted(failure.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        message, hint = _explain(errors[0], config_class)
        if len(errors) > 1:
            others = dict.fromkeys(_dotted(e["loc"], config_class) for e in errors[1:])
            hint += ("; " if hint else "") + f"also wrong: {', '.join(others)}"
        raise ConfigError(f"{source}: {message}", hint) from None


def _explain(error: ErrorDetails, config_class: type[BaseModel]) -> tuple[str, str]:
    """One pydantic error as (sentence, hint)."""
    key, value, context = _dotted(error["loc"], config_class), error["input"], error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key '{key}'", _did_you_mean(key, config_class)
        case "missing":
            return f"'{key}' is missing", _describe(key, config_class)
        case "value_error":
            return f"{key}: {context['error']}" if key else str(context["error"]), ""
        case "literal_error":
            options = context["expected"].replace("'", "").replace(" or ", ", ")
            return f"'{key}' is {_show(value)}, but must be one of {options}", _close(str(value), options.split(", "))
        case "greater_than_equal":
            bound = f"at least {context['ge']:g}"
        case "greater_than":
            bound = f"greater than {context['gt']:g}"
        case "less_than_equal":
            bound = f"at most {context['le']:g}"
        case "less_than":
            bound = f"less than {context['lt']:g}"
        case "string_pattern_mismatch":
            return f"'{key}' is {_show(value)}, which cannot name a folder", "use letters, digits, '.', '_' and '-' only"
        case "model_type" if value is None:
            return f"'{key}' is empty", "write its keys below it, indented, or remove the line to have the defaults"
        case _:
            return f"'{key}' is {_show(value)}, but must be {_wanted(error)}", _describe(key, config_class)
    return f"'{key}' is {_show(value)}, but must be {bound}", _describe(key, config_class)


_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping of keys",
    "model": "a mapping of keys",
}


def _wanted(error: ErrorDetails) -> str:
    for start, words in _WANTED.items():
        if error["type"].startswith(start):
            return words
    return error["msg"]


def _dotted(loc: Sequence[int | str], config_class: type[BaseModel]) -> str:
    """``rollout.max_context``; list positions as ``[i]``, pydantic's own inner labels left out."""
    text, model = "", config_class
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
            continue
        text += f".{part}" if text else part
        inner = _submodel(model.model_fields[part].annotation) if part in model.model_fields else None
        if inner is None:
            break
        model = inner
    index = len(text.replace("[", ".[").split("."))
    if len(loc) > index and isinstance(loc[index], int):
        text += f"[{loc[index]}]"
    return text


def _submodel(annotation: Any) -> type[BaseModel] | None:
    options = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _field_type(config_class: type[BaseModel], parts: Sequence[str]) -> Any:
    """The annotation of a dotted key, None when there is no such key."""
    annotation: Any = config_class
    for part in parts:
        model = _submodel(annotation)
        if model is None or part not in model.model_fields:
            return None
        annotation = model.model_fields[part].annotation
    return annotation


def _describe(key: str, config_class: type[BaseModel]) -> str:
    """The docstring of a key, as a hint."""
    parts = key.partition("[")[0].split(".")
    model = _submodel(config_class if len(parts) == 1 else _field_type(config_class, parts[:-1]))
    field = model.model_fields.get(parts[-1]) if model else None
    if field is None:
        return ""
    inner = _submodel(field.annotation)
    text = field.description or (inner.__doc__ if inner and field.is_required() else "") or ""
    return f"{key}: {' '.join(text.split())}" if text else ""


def all_keys(config_class: type[BaseModel] = GRPOConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, pydantic field) of the whole tree, sections included, in the order of the file."""
    for name, field in config_class.model_fields.items():
        yield f"{prefix}{name}", field
        inner = _submodel(field.annotation)
        if inner is not None:
            yield from all_keys(inner, f"{prefix}{name}.")


def list_keys(config_class: type[BaseModel] = GRPOConfig) -> str:
    """Every key with its default and meaning, for reading."""
    lines = []
    for key, field in all_keys(config_class):
        meaning = " ".join((field.description or "").split())
        inner = _submodel(field.annotation)
        if inner is not None:
            meaning = meaning or " ".join((inner.__doc__ or "").split())
            lines.append(f"\n{key}{'' if field.default is not None else ' = null'}{'  # ' + meaning if meaning else ''}")
            continue
        default = "" if field.is_required() else f" = {_flow(field.get_default(call_default_factory=True))}"
        lines.append(f"{key}{default}{'  # ' + meaning if meaning else ''}")
    return "\n".join(lines)


def _flow(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def dump_yaml(config: BaseModel) -> str:
    """The whole configuration with its defaults, as the file that would give it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _did_you_mean(key: str, config_class: type[BaseModel]) -> str:
    section, _, name = key.rpartition(".")
    keys = [k for k, _ in all_keys(config_class)]
    siblings = [k for k in keys if k.rpartition(".")[0] == section]
    if near := difflib.get_close_matches(name, [k.rpartition(".")[2] for k in siblings], n=1, cutoff=0.6):
        return f"did you mean '{section + '.' if section else ''}{near[0]}'?"
    if elsewhere := [k for k in keys if k.rpartition(".")[2] == name]:
        return f"did you mean '{elsewhere[0]}'?"
    if near := difflib.get_close_matches(name, [k.rpartition(".")[2] for k in keys], n=1, cutoff=0.75):
        return f"did you mean '{next(k for k in keys if k.rpartition('.')[2] == near[0])}'?"
    return f"{section or 'the top level'} has {', '.join(k.rpartition('.')[2] for k in siblings)}"


def _close(value: str, options: list[str]) -> str:
    near = difflib.get_close_matches(value, options, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else ""


def _show(value: Any) -> str:
    if isinstance(value, str):
        text = f"'{value}'"
    elif value is None or isinstance(value, (bool, int, float)):
        text = json.dumps(value)
    else:
        text = _kind(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: Any) -> str:
    match value:
        case dict():
            return "a mapping of keys"
        case list():
            return "a list"
        case str():
            return f"the text '{value[:40]}'"
        case None:
            return "null"
        case _:
            return f"the value {value}"
