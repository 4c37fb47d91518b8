"""Configurations in and out: recipe, TOML file, flags, ``--set`` to one `RunConfig`, and back."""

from __future__ import annotations

import difflib
import reprlib
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fastppt.config import Recipe, RunConfig
from fastppt.errors import UserError
from fastppt.text_files import read_toml

Table = dict[str, Any]

# Letters: of a value in a message, and of a ``--set``.
SHOWN = 80
LONGEST_SETTING = 10_000

RECIPES = ("lora", "ppt-lora", "apt-base", "apt-ata", "apt-ata-rs", "apt")
DEFAULT_RECIPE = "ppt-lora"

# Settings without which a run cannot start, and the flag that gives each.
REQUIRED = {
    "model.path": "--model",
    "photos.folder": "--photos",
    "prompts.class_noun": "--class-noun",
    "output": "--output",
}

# What the patterns of `config` mean.
PATTERNS_IN_WORDS = {
    "model.device": "must be auto, cpu, cuda or cuda:N",
    "name": "must begin with a letter or digit and hold only those, spaces and . _ -",
    "prompts.class_prompt": "must contain {class_noun}",
    "prompts.subject": "must contain {token}",
    "prompts.template": "must contain {subject}",
}

# pydantic's names for values of the wrong type, and what is wanted.
TYPES_IN_WORDS = {
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": 'a list, such as ["a", "b"]',
    "path_type": "text in quotes",
    "string_too_short": "text that is not empty",
    "string_type": "text in quotes",
    "too_short": "a list that is not empty",
    "string_unicode": "text in UTF-8",
}


def load_recipe(name: str) -> tuple[Recipe, Table]:
    """Return a recipe's description and its part of a run.

    Raises:
        UserError: there is no recipe of that name; the nearest one is named.
    """
    if name not in RECIPES:
        raise UserError(
            f"recipe {_shown(name)} does not exist{_did_you_mean(name, RECIPES)} "
            f"(there are: {', '.join(RECIPES)})"
        )
    text = files("fastppt").joinpath("recipes", f"{name}.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    described = {key: table.pop(key) for key in Recipe.model_fields}
    return Recipe.model_validate(described), table


def build_config(
    recipe: str | None = None,
    file: Path | None = None,
    settings: Sequence[tuple[str, Any]] = (),
) -> RunConfig:
    """Lay a TOML file over a recipe over the defaults, and settings over all of it.

    A ``[[stage]]`` list in the file replaces the recipe's stages whole, so that a file which a run
    wrote gives that run again. Without a recipe, and without stages in the file, the recipe is
    ``ppt-lora``.

    Args:
        recipe: Name of a recipe; wins over the file's ``recipe``.
        file: A TOML file of a run, whole or in part.
        settings: Dotted keys and their values, later ones win; stages count from 0.

    Raises:
        UserError: unknown recipe, unreadable file, unknown key, or a value out of range.
    """
    table = read_toml(file) if file is not None else {}
    recipe = dict(settings).get("recipe", recipe)
    name = recipe if recipe is not None else table.get("recipe")
    if name is not None and not isinstance(name, str):
        origin = f"{file}: " if recipe is None else ""
        raise UserError(f"{origin}recipe must be a name in quotes, got {_shown(name)}")
    if isinstance(table.get("stage"), dict):
        raise UserError(f"{file}: write [[stage]] with two brackets: a run is a list of stages")
    if name is None and "stage" not in table:
        name = DEFAULT_RECIPE
    if name is not None:
        if recipe is not None and recipe != table.get("recipe"):
            # Another recipe than the file's was asked for by flag: its stages win.
            table.pop("stage", None)
        table = _merge(load_recipe(name)[1], table) | {"recipe": name}
    for key, value in settings:
        _set_key(table, key, value)
    try:
        return RunConfig.model_validate(table)
    except RecursionError:
        raise UserError(f"{file or 'settings'}: a value is too deeply nested") from None
    except ValidationError as error:
        origin = str(file) if file is not None else f"recipe {name}"
        given = {key for key, _ in settings}
        messages = [
            _explain(details) if _key(details) in given else f"{origin}: {_explain(details)}"
            for details in error.errors()
        ]
        raise UserError("\n".join(messages)) from None


def parse_setting(text: str) -> tuple[str, Any]:
    """Split ``key=value`` of a ``--set``; the value is TOML, or a bare string where it is not.

    Raises:
        UserError: there is no ``=`` in it, or it is too long.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text}: write it as key=value, such as --set stage.0.steps=200")
    if len(text) > LONGEST_SETTING:
        raise UserError(f"--set {text[:SHOWN]}...: is over {LONGEST_SETTING} letters long")
    try:
        table = tomllib.loads(f"value = {value}")
    # TOMLDecodeError, and what Python says of a number of too many digits.
    except (ValueError, RecursionError):
        return key.strip(), value.strip()
    # Text with a line break may read like more of a TOML file.
    return key.strip(), table["value"] if len(table) == 1 else value.strip()


def check_complete(config: RunConfig) -> None:
    """Refuse a configuration that lacks what every run needs.

    Raises:
        UserError: names the key that is missing and the flag that gives it.
    """
    for key, flag in REQUIRED.items():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        if value is None:
            raise UserError(f"{key} is not set: pass {flag}, or write it in the run's TOML file")


def check_recipe_fits(config: RunConfig, family: str) -> None:
    """Refuse a recipe that does not exist for the family of the run's model.

    Raises:
        UserError: names the recipe's families, and the recipes for this one.
    """
    if config.recipe is None:
        return
    families = load_recipe(config.recipe)[0].families
    if family not in families:
        others = [name for name in RECIPES if family in load_recipe(name)[0].families]
        raise UserError(
            f"recipe {config.recipe}: is for {', '.join(families)}; {config.model.path} is "
            f"{family}. Give another model, or another recipe "
            f"(for {family} there are: {', '.join(others) or 'none'})"
        )


def render_toml(config: RunConfig) -> str:
    """Return the whole configuration as TOML, with the sentence of each field above it.

    Unset keys stand there as comments, and so do tables that the run does without, such as an
    objective that it does not have, with their defaults. `build_config` on the text gives an equal
    configuration.
    """
    head = "# A run of fastppt. `fastppt train FILE` takes this file; flags win over it.\n"
    return head + "\n".join(_render_table(config, ())) + "\n"


def _render_table(section: BaseModel, path: tuple[str, ...]) -> Iterator[str]:
    tables: list[tuple[str, Any, type[BaseModel]]] = []
    for name, field in type(section).model_fields.items():
        value, own_type = getattr(section, name), _section_type(field.annotation)
        if own_type is not None:
            tables.append((name, value, own_type))
        else:
            assert field.description is not None
            yield from (f"# {line}" for line in field.description.splitlines())
            yield _render_key(name, value)
    for name, value, own_type in tables:
        if value is None:
            lines = list(_render_header(own_type(), (*path, name), "[{}]"))
            yield from (f"# {line}" if line else "" for line in lines)
        elif isinstance(value, BaseModel):
            yield from _render_header(value, (*path, name), "[{}]")
        else:
            for stage in value:
                yield from _render_header(stage, (*path, name), "[[{}]]")


def _render_header(section: BaseModel, path: tuple[str, ...], brackets: str) -> Iterator[str]:
    yield ""
    doc = (type(section).__doc__ or "").strip().split("\n\n")[0]
    yield from (f"# {line.strip()}" for line in doc.splitlines())
    yield brackets.format(".".join(path))
    yield from _render_table(section, path)


def _render_key(name: str, value: Any) -> str:
    if value is None:
        return f"# {name} ="
    plain = str(value) if isinstance(value, Path) else value
    return tomli_w.dumps({name: plain}).rstrip("\n")


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> Table:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _set_key(table: Table, key: str, value: Any) -> None:
    here: Any = table
    parts = key.split(".")
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        if isinstance(here, list):
            here = _list_item(here, part, ".".join(parts[: place + 1]))
            if last:
                raise UserError(f"{key}: names a whole table; name one key in it")
        elif not isinstance(here, dict):
            raise UserError(f"{key}: {'.'.join(parts[:place])} is a value, not a table")
        elif last:
            here[part] = value
        else:
            here = here.setdefault(part, {})


def _list_item(items: list[Any], part: str, key: str) -> Any:
    known = [str(index) for index in range(len(items))]
    if part not in known:
        counted = ", ".join(known) or "none"
        raise UserError(f"{key}: there is no such stage (stages count from 0; here: {counted})")
    return items[int(part)]


def _explain(details: ErrorDetails) -> str:
    """Say one of pydantic's findings in a user's words: the key, what is wanted, what was given."""
    key = _key(details)
    context = details.get("ctx", {})
    given = _shown(details["input"])
    match details["type"]:
        case "extra_forbidden":
            section = _section_at(details["loc"][:-1])
            names = list(section.model_fields) if section is not None else []
            return f"unknown key {key}{_did_you_mean(str(details['loc'][-1]), names)}"
        case "greater_than_equal":
            return f"{key} must be >= {context['ge']:g}, got {given}"
        case "greater_than":
            return f"{key} must be > {context['gt']:g}, got {given}"
        case "less_than":
            return f"{key} must be < {context['lt']:g}, got {given}"
        case "less_than_equal":
            return f"{key} must be <= {context['le']:g}, got {given}"
        case "literal_error":
            return f"{key} must be {context['expected']}, got {given}"
        case "model_type" | "dict_type":
            return f"{key} must be a table, got {given}"
        case "missing":
            return f"{key} is missing"
        case "value_error":
            return f"{key}: {context['error']}" if key else str(context["error"])
        case "string_pattern_mismatch":
            return f"{key} {PATTERNS_IN_WORDS[key]}, got {given}"
        case kind if kind in TYPES_IN_WORDS:
            return f"{key} must be {TYPES_IN_WORDS[kind]}, got {given}"
        case _:
            message = details["msg"][0].lower() + details["msg"][1:]
            return f"{key}: {message}, got {given}"


class _Shown(reprlib.Repr):
    """Writes values as Python does, cut where they are long or deep."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = SHOWN

    def repr_int(self, number: int, level: int) -> str:
        """Write a whole number; Python itself writes none of thousands of digits in decimals."""
        if abs(number) < 10**SHOWN:
            return repr(number)
        return f"{'-' * (number < 0)}{hex(abs(number))[:SHOWN]}..."


def _shown(value: object) -> str:
    """Return a value as Python writes it, cut where it is long or deep."""
    return _Shown().repr(value)


def _key(details: ErrorDetails) -> str:
    # A key from a file may be as long as the file.
    return ".".join(str(part)[:SHOWN] for part in details["loc"])


def _section_at(location: Sequence[int | str]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = RunConfig
    for part in location:
        if isinstance(part, int) or section is None:
            continue
        field = section.model_fields.get(part)
        section = _section_type(field.annotation) if field is not None else None
    return section


def _section_type(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds: itself, optional, or the items of its list."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    for argument in get_args(annotation):
        found = _section_type(argument)
        if found is not None:
            return found
    return None


def _did_you_mean(given: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(given[:SHOWN], known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
