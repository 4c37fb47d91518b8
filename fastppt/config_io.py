"""Configurations in and out: recipe, TOML file, flags, ``--set`` to one `RunConfig`, and back."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from fastppt.config import ModelConfig, Recipe, RunConfig
from fastppt.config_errors import SHOWN, did_you_mean, explain, key_of, shown
from fastppt.config_types import section_type
from fastppt.errors import UserError
from fastppt.text_files import read_toml
from fastppt.trainables_config import NETWORK_TRAINABLES, TrainablesConfig

Table = dict[str, Any]

# Letters of a ``--set``.
LONGEST_SETTING = 10_000

RECIPES = (
    *("lora", "ppt-lora", "lora-prior"),
    *("dreambooth", "dreambooth-prior", "ppt-dreambooth"),
    *("custom-diffusion", "custom-diffusion-prior", "ppt-custom-diffusion"),
    *("textual-inversion", "dco", "oft", "svdiff", "rare-token"),
    *("apt-base", "apt-ata", "apt-ata-rs", "apt"),
)
DEFAULT_RECIPE = "ppt-lora"

# Tables of which a stage has one at most.
ALTERNATIVES = [
    section_type(TrainablesConfig.model_fields[name].annotation) for name in NETWORK_TRAINABLES
]

# Settings without which a run cannot start, and the flag that gives each.
REQUIRED = {
    "model.path": "--model",
    "photos.folder": "--photos",
    "prompts.class_noun": "--class-noun",
    "output": "--output",
}


def load_recipe(
    name: str, family: str | None = None, model: str | None = None
) -> tuple[Recipe, Table]:
    """Return a recipe's description and its part of a run.

    A recipe may have variants. A `[[variant]]` for some of its families is a part of a run that
    lies over the rest; its stages replace those of the rest whole. One for some embedded models
    has `settings`, by dotted keys.

    Args:
        name: Of the recipe.
        family: Of the model.
        model: Name of an embedded model.

    Raises:
        UserError: there is no recipe of that name; the nearest one is named.
    """
    if name not in RECIPES:
        raise UserError(
            f"recipe {shown(name)} does not exist{did_you_mean(name, RECIPES)} "
            f"(there are: {', '.join(RECIPES)})"
        )
    table = tomllib.loads(recipe_text(name))
    described = {key: table.pop(key) for key in Recipe.model_fields}
    for variant in table.pop("variant", ()):
        families, models = variant.pop("families", ()), variant.pop("models", ())
        settings = variant.pop("settings", {})
        if family in families:
            table = _merge(table, variant)
        if model in models:
            for key, value in settings.items():
                _set_key(table, key, value)
    return Recipe.model_validate(described), table


def recipe_text(name: str) -> str:
    """Return the TOML file of one of `RECIPES`."""
    return files("fastppt").joinpath("recipes", f"{name}.toml").read_text(encoding="utf-8")


def recipe_settings(name: str) -> str:
    """Return the settings of one of `RECIPES` as they stand in its file, variants among them."""
    return recipe_text(name).partition("\n\n")[2]


def build_config(
    recipe: str | None = None,
    file: Path | None = None,
    settings: Sequence[tuple[str, Any]] = (),
) -> RunConfig:
    """Lay a TOML file over a recipe over the defaults, and settings over all of it.

    A ``[[stage]]`` list in the file replaces the recipe's stages whole, so that a file which a run
    wrote gives that run again. Without a recipe, and without stages in the file, the recipe is
    ``ppt-lora``. A recipe that differs by family is that of the model's; without a model, that of
    its first family. An embedded model that is given by name may have settings of its own in it.

    Args:
        recipe: Name of a recipe; wins over the file's ``recipe``.
        file: A TOML file of a run, whole or in part.
        settings: Dotted keys and their values, later ones win; stages count from 0.

    Raises:
        UserError: unknown recipe, unreadable file, unknown key, or a value out of range.
    """
    name, table = _lay(recipe, file, settings)
    try:
        return RunConfig.model_validate(table)
    except RecursionError:
        raise UserError(f"{file or 'settings'}: a value is too deeply nested") from None
    except ValidationError as error:
        origin = str(file) if file is not None else f"recipe {name}"
        given = {key for key, _ in settings}
        messages = [
            explain(details) if key_of(details) in given else f"{origin}: {explain(details)}"
            for details in error.errors()
        ]
        raise UserError("\n".join(messages)) from None


def stage_tables(
    recipe: str | None = None,
    file: Path | None = None,
    settings: Sequence[tuple[str, Any]] = (),
) -> list[Table]:
    """Return the stages that `build_config` is going to check, as they are written.

    Raises:
        UserError: as `build_config`, but for what is in the stages.
    """
    stages = _lay(recipe, file, settings)[1].get("stage")
    stages = stages if isinstance(stages, list) else []
    return [stage if isinstance(stage, dict) else {} for stage in stages]


def _lay(
    recipe: str | None, file: Path | None, settings: Sequence[tuple[str, Any]]
) -> tuple[str | None, Table]:
    """Return the name of the recipe, and recipe, file and settings one over the other."""
    table = read_toml(file) if file is not None else {}
    recipe = dict(settings).get("recipe", recipe)
    name = recipe if recipe is not None else table.get("recipe")
    if name is not None and not isinstance(name, str):
        origin = f"{file}: " if recipe is None else ""
        raise UserError(f"{origin}recipe must be a name in quotes, got {shown(name)}")
    if isinstance(table.get("stage"), dict):
        raise UserError(f"{file}: write [[stage]] with two brackets: a run is a list of stages")
    if name is None and "stage" not in table:
        name = DEFAULT_RECIPE
    if name is not None:
        if recipe is not None and recipe != table.get("recipe"):
            # Another recipe than the file's was asked for by flag: its stages win.
            table.pop("stage", None)
        varied = _varied(name) if "stage" not in table else set()
        model = _model(table, settings) if varied else ModelConfig()
        family = _family(model) if "families" in varied else None
        table = _merge(load_recipe(name, family, model.path)[1], table) | {"recipe": name}
    for key, value in settings:
        _set_key(table, key, value)
    return name, table


def _varied(name: str) -> set[str]:
    """Return what the variants of a recipe are for: "families", "models", both or nothing."""
    variants = tomllib.loads(recipe_text(name)).get("variant", ()) if name in RECIPES else ()
    return {what for variant in variants for what in ("families", "models") if what in variant}


def _model(table: Table, settings: Sequence[tuple[str, Any]]) -> ModelConfig:
    """Return the model that file and settings give; the default where it is refused later."""
    given = {"model": dict(table["model"])} if isinstance(table.get("model"), dict) else {}
    for key, value in settings:
        if key.partition(".")[0] == "model":
            _set_key(given, key, value)
    try:
        return ModelConfig.model_validate(given.get("model", {}))
    except (ValidationError, RecursionError):
        # It is refused with the rest of the configuration.
        return ModelConfig()


def _family(model: ModelConfig) -> str | None:
    """Return the family of a model; None where none is given.

    Raises:
        UserError: there is no such model, or it is of no known family.
    """
    if model.path is None:
        return None
    # Imported where a recipe asks: it takes seconds.
    from fastppt.families.loading import detect_family

    return detect_family(model)


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
    objective that it does not have, with their defaults; of what else could move the network there
    is a line each. `build_config` on the text gives an equal configuration.
    """
    head = "# A run of fastppt. `fastppt train FILE` takes this file; flags win over it.\n"
    return head + "\n".join(_render_table(config, ())) + "\n"


def _render_table(section: BaseModel, path: tuple[str, ...]) -> Iterator[str]:
    tables: list[tuple[str, Any, type[BaseModel]]] = []
    for name, field in type(section).model_fields.items():
        value, own_type = getattr(section, name), section_type(field.annotation)
        if own_type is not None:
            tables.append((name, value, own_type))
        else:
            assert field.description is not None
            yield from (f"# {line}" for line in field.description.splitlines())
            yield _render_key(name, value)
    others = [
        (name, own_type)
        for name, value, own_type in tables
        if value is None and own_type in ALTERNATIVES
    ]
    for name, value, own_type in tables:
        if (name, own_type) in others:
            continue
        if value is None:
            lines = list(_render_header(own_type(), (*path, name), "[{}]"))
            yield from (f"# {line}" if line else "" for line in lines)
        elif isinstance(value, BaseModel):
            yield from _render_header(value, (*path, name), "[{}]")
        else:
            for stage in value:
                yield from _render_header(stage, (*path, name), "[[{}]]")
    if others:
        yield from ("", "# What could move the network in its place, one at a time:")
        for name, own_type in others:
            yield f"# [{'.'.join((*path, name))}]  {' '.join(_description(own_type))}"


def _render_header(section: BaseModel, path: tuple[str, ...], brackets: str) -> Iterator[str]:
    yield ""
    yield from (f"# {line}" for line in _description(type(section)))
    yield brackets.format(".".join(path))
    yield from _render_table(section, path)


def _description(section: type[BaseModel]) -> list[str]:
    """Return the lines of the sentence that says what a table is."""
    sentence = (section.__doc__ or "").strip().split("\n\n")[0]
    return [line.strip() for line in sentence.splitlines()]


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
