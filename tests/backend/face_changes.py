"""What a public face has otherwise than an older one, and how far the version must rise for it."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

SETTABLE = "property that can be set"
BY_POSITION, BY_EITHER, BY_NAME = "by position", "by position or name", "by name"
ORDERED = (BY_POSITION, BY_EITHER)

Entry = dict[str, Any]
"""What is known of one name: its kind, and what such a kind has."""
Face = dict[str, dict[str, Entry]]
"""Entries by name, by module."""


class Level(IntEnum):
    """How much a change asks of those who use the face."""

    WORDING = 1
    ADDITION = 2
    BREAKING = 3


@dataclass(frozen=True)
class Change:
    """One difference between two faces."""

    level: Level
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.level.name.lower():<9} {self.name}: {self.text}"


def compare(old: Face, new: Face) -> list[Change]:
    """Return what a newer face has otherwise than an older one, the gravest first."""
    changes = []
    for module in old | new:
        changes += compare_names(module, old.get(module, {}), new.get(module, {}))
    return sorted(changes, key=lambda change: -change.level)


def compare_names(at: str, old: dict[str, Entry], new: dict[str, Entry]) -> list[Change]:
    changes = [Change(Level.BREAKING, f"{at}.{name}", "removed") for name in old if name not in new]
    changes += [Change(Level.ADDITION, f"{at}.{name}", "new") for name in new if name not in old]
    for name in old.keys() & new.keys():
        changes += compare_entries(f"{at}.{name}", old[name], new[name])
    return changes


def compare_entries(name: str, old: Entry, new: Entry) -> list[Change]:
    if old["kind"] != new["kind"]:
        widened = (old["kind"], new["kind"]) == ("property", SETTABLE)
        level = Level.ADDITION if widened else Level.BREAKING
        return [Change(level, name, f"was a {old['kind']}, is a {new['kind']}")]
    changes = compare_arguments(name, old.get("arguments", []), new.get("arguments", []))
    for key in ("of", "type", "bases"):
        if old.get(key) != new.get(key):
            widened = key == "bases" and set(old[key]) <= set(new[key])
            level = Level.ADDITION if widened else Level.BREAKING
            changes.append(Change(level, name, f"{key} {old[key]} became {new[key]}"))
    for key in ("returns", "annotation"):
        changes += compare_types(name, old.get(key, ""), new.get(key, ""), is_taken=False)
    if old.get("doc") != new.get("doc"):
        changes.append(Change(Level.WORDING, name, "docstring"))
    return changes + compare_names(name, old.get("members", {}), new.get("members", {}))


@dataclass(frozen=True)
class Argument:
    """One argument of a call; annotation and default are "" where there are none."""

    kind: str
    annotation: str
    default: str


def parse(texts: list[str]) -> dict[str, Argument]:
    """Return the arguments that stand so between the brackets of a function, by name."""
    node = ast.parse(f"def f({', '.join(texts)}): ...").body[0].args  # type: ignore[attr-defined]
    positional = [*node.posonlyargs, *node.args]
    defaults = [None] * (len(positional) - len(node.defaults)) + node.defaults + node.kw_defaults
    groups = {
        BY_POSITION: node.posonlyargs,
        BY_EITHER: node.args,
        BY_NAME: node.kwonlyargs,
        "the rest by position": [node.vararg] if node.vararg else [],
        "the rest by name": [node.kwarg] if node.kwarg else [],
    }
    found = [(kind, each) for kind, group in groups.items() for each in group]
    defaults += [None] * (len(found) - len(defaults))
    return {
        each.arg: Argument(kind, unparse(each.annotation), unparse(default))
        for (kind, each), default in zip(found, defaults, strict=True)
    }


def unparse(node: ast.expr | None) -> str:
    return ast.unparse(node) if node else ""


def compare_arguments(name: str, old_texts: list[str], new_texts: list[str]) -> list[Change]:
    """Return what has changed for those who call it."""
    old, new = parse(old_texts), parse(new_texts)
    changes = [
        Change(Level.BREAKING, name, f"argument {each} removed") for each in old if each not in new
    ]
    for each in (each for each in new if each not in old):
        if new[each].default or new[each].kind.startswith("the rest"):
            changes.append(Change(Level.ADDITION, name, f"new argument {each}"))
        else:
            changes.append(Change(Level.BREAKING, name, f"new argument {each} without default"))
    before, after = ([n for n, a in each.items() if a.kind in ORDERED] for each in (old, new))
    kept = [each for each in before if each in after]
    if after[: len(kept)] != kept:
        changes.append(Change(Level.BREAKING, name, f"arguments by position {before} are {after}"))
    for each in (each for each in old if each in new):
        changes += compare_argument(f"{name}({each})", old[each], new[each])
    return changes


def compare_argument(name: str, old: Argument, new: Argument) -> list[Change]:
    changes = []
    if old.kind != new.kind:
        level = Level.ADDITION if new.kind == BY_EITHER else Level.BREAKING
        changes.append(Change(level, name, f"was given {old.kind}, is given {new.kind}"))
    if old.default != new.default:
        level = Level.BREAKING if old.default else Level.ADDITION
        text = f"default {old.default or 'none'} became {new.default or 'none'}"
        changes.append(Change(level, name, text))
    return changes + compare_types(name, old.annotation, new.annotation, is_taken=True)


def compare_types(name: str, old: str, new: str, *, is_taken: bool) -> list[Change]:
    """Return the change of an annotation.

    Fewer types taken than before are breaking, and so are more types returned. Of types of other
    names the text does not tell; they count as an addition.
    """
    if old == new:
        return []
    olds, news = (set(each.split(" | ")) for each in (old, new))
    is_narrower = news < olds if is_taken else olds < news
    level = Level.BREAKING if is_narrower else Level.ADDITION
    return [Change(level, name, f"type {old or 'none'} became {new or 'none'}")]


def is_released(version: str, changelog: str) -> bool:
    """Say whether a changelog has a heading of the version: `## 0.1.0` or `## [0.1.0] - date`."""
    return bool(re.search(rf"^## \[?{re.escape(version)}\]?(\s|$)", changelog, re.MULTILINE))


def numbers(version: str) -> tuple[int, int, int]:
    major, minor, patch = re.findall(r"\d+", version)[:3]
    return int(major), int(minor), int(patch)


def needed_version(released: str, changes: list[Change]) -> str:
    """Return the lowest version that changes since a release allow, by Semantic Versioning.

    While the major is 0, a breaking change raises the minor. An addition raises the minor in any
    case, a wording the patch.
    """
    major, minor, patch = numbers(released)
    level = max((change.level for change in changes), default=None)
    if level is None:
        return released
    if level is Level.BREAKING and major > 0:
        return f"{major + 1}.0.0"
    return f"{major}.{minor}.{patch + 1}" if level is Level.WORDING else f"{major}.{minor + 1}.0"


def why_too_low(version: str, released: str, changes: list[Change]) -> str | None:
    """Return why the version is too low for what has changed since a release; None if it is not."""
    needed = needed_version(released, changes)
    if numbers(version) >= numbers(needed):
        return None
    return (
        f"since the release {released} this has changed: {' '.join(str(changes[0]).split())}; the "
        f"version must be {needed} or higher, and is "
        f"{version}. Raise it in pyproject.toml, kernels/pyproject.toml and fastppt/__init__.py"
    )
