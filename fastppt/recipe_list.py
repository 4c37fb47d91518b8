"""What `fastppt recipes` prints."""

from __future__ import annotations

import sys

from rich.box import HEAVY_HEAD
from rich.table import Table

from fastppt.config_io import RECIPES, load_recipe, recipe_settings
from fastppt.console import SafeConsole

# Letters of a line in a pipe or a file, where nothing wraps it.
LONGEST_LINE = 1000


def print_recipes() -> None:
    """Print a table of all recipes, and which families of models each is for."""
    recipes = {name: load_recipe(name)[0] for name in RECIPES}
    families = dict.fromkeys(family for recipe in recipes.values() for family in recipe.families)
    console = _console()
    table = Table(
        "recipe", *families, "what it is", box=HEAVY_HEAD if console.is_terminal else None
    )
    for name, recipe in recipes.items():
        marks = ["yes" if family in recipe.families else "-" for family in families]
        table.add_row(name, *marks, recipe.summary)
    console.print(table)


def print_recipe(name: str) -> None:
    """Print what a recipe is, where it comes from, and its settings as TOML.

    Raises:
        UserError: there is no recipe of that name.
    """
    recipe, _ = load_recipe(name)
    families = ", ".join(recipe.families)
    said = f"{name} (for {families}): {recipe.summary}.\n\n{recipe.source}\n"
    _console().print(said, markup=False)
    print(recipe_settings(name), end="")


def _console() -> SafeConsole:
    return SafeConsole(width=None if sys.stdout.isatty() else LONGEST_LINE)
