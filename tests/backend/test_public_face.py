"""The public face is as it was pinned, and the version rises with what changes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

import fastppt
from tests.backend import public_face
from tests.backend.face_changes import Level, compare, is_released, needed_version
from tests.backend.public_face import PIN, RELEASED, check_pin, pin_face, read_face

CHANGELOG = "# Changelog\n\n## Unreleased\n\nAs in 0.3.0.\n\n"

SOURCE = '''
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

__all__ = ["Base", "Face", "VERSION", "same", "take"]
VERSION = "1"
DEFAULT = object()


@dataclass(frozen=True)
class Result:
    """What comes out."""

    total: float
    parts: "list[float] | None" = None


class Base:
    """The base."""

    def inherited(self, x: int) -> int:
        """Give it back."""
        return x


class Face(Base):
    """The face.

    In two paragraphs.
    """

    def __init__(self, a: float | None, /, b=1e-3, *rest: int, c: str = "x", **more: str) -> None:
        self.shown = self._hidden = a
        self.typed: int = 3

    def __call__(self, x: int) -> Result:
        """Call."""

    def _private(self) -> None: ...

    @property
    def value(self) -> int:
        """A value."""
        return 1

    @value.setter
    def value(self, value: int) -> None: ...

    @cached_property
    def found(self) -> int:
        return 2

    @contextmanager
    def within(self):
        """Be within."""
        yield

    @staticmethod
    def still(x: int) -> int:
        return x

    @classmethod
    def made(cls, x: int = DEFAULT) -> None: ...


def take(x: int, *, y: bool = True) -> int:
    """Take it."""


same = take
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of ours with one of each kind of name."""
    (tmp_path / "module_with_a_face.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(public_face, "PACKAGES", ("module_with_a_face",))
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "module_with_a_face", raising=False)
    return "module_with_a_face"


def function(*arguments: str, returns: str = "int", doc: str = "") -> dict[str, object]:
    return {
        "kind": "function",
        "arguments": list(arguments),
        "returns": returns,
        "doc": [doc] if doc else [],
    }


def face_of(**entries: dict[str, object]) -> dict[str, dict[str, dict[str, object]]]:
    return {"module": entries}


def test_the_public_face_is_as_pinned_and_the_version_high_enough() -> None:
    folder = Path(__file__).parent
    changelog = (public_face.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    wrong = check_pin(read_face(), fastppt.__version__, folder, changelog)
    if wrong is not None:
        pytest.fail(wrong, pytrace=False)


def test_every_public_name_has_a_docstring() -> None:
    for module, entries in read_face().items():
        for name, entry in entries.items():
            members = entry.get("members", {})
            assert entry.get("doc", True), f"{module}.{name}"
            assert all(each.get("doc", True) for each in members.values()), f"{module}.{name}"


def test_each_kind_of_name_is_read(module: str) -> None:
    face = read_face((module,))
    names = face[module]
    assert names["VERSION"] == {"kind": "value", "type": "str"}
    assert names["take"] == {"kind": "alias", "of": f"{module}.same"}
    assert names["same"] == function("x: int", "*", "y: bool = True", doc="Take it.")
    entry = names["Face"]
    assert entry["doc"] == ["The face.", "", "In two paragraphs."] and entry["bases"] == ["Base"]
    assert entry["arguments"] == [
        *("a: float | None", "/", "b = 0.001", "*rest: int", "c: str = 'x'", "**more: str")
    ]
    members = entry["members"]
    assert {name: each["kind"] for name, each in members.items()} == {
        "__call__": "function",
        "found": "property",
        "inherited": "function",
        "made": "class method",
        "shown": "attribute",
        "still": "static method",
        "typed": "attribute",
        "value": "property that can be set",
        "within": "context manager",
    }
    assert members["inherited"]["arguments"] == members["still"]["arguments"] == ["x: int"]
    assert members["made"]["arguments"] == ["x: int = DEFAULT"]
    assert members["typed"]["annotation"] == members["value"]["returns"] == "int"
    result = face["returned"]["Result"]
    assert result["arguments"] == ["total: float", "parts: 'list[float] | None' = None"]
    assert result["members"]["total"] == {"kind": "attribute", "annotation": "float"}
    assert list(face["returned"]) == ["Result"]
    assert compare(json.loads(json.dumps(face)), face) == []


X = function("x: int")
LEVELS = [
    (X, X, None),
    (X, function(), Level.BREAKING),
    (X, function("z: int"), Level.BREAKING),
    (X, function("x: int", "y: int"), Level.BREAKING),
    (X, function("y: int = 1", "x: int = 1"), Level.BREAKING),
    (X, function("x: int", "*", "y: int"), Level.BREAKING),
    (X, function("*", "x: int"), Level.BREAKING),
    (X, function("x: int", "/"), Level.BREAKING),
    (X, function("x: int", returns="int | None"), Level.BREAKING),
    (X, {"kind": "value", "type": "int"}, Level.BREAKING),
    (X, function("x: int = 1"), Level.ADDITION),
    (X, function("x: int", "y: int = 1"), Level.ADDITION),
    (X, function("x: int", "*", "y: int = 1"), Level.ADDITION),
    (X, function("x: int", "**more"), Level.ADDITION),
    (X, function("x: int | float"), Level.ADDITION),
    (X, function("x: int", doc="In words."), Level.WORDING),
    (function("x: int | None"), X, Level.BREAKING),
    (function("x = 1"), function("x = 2"), Level.BREAKING),
    (function("x = 1"), function("x"), Level.BREAKING),
    (function("x", "y"), function("y", "x"), Level.BREAKING),
    (function("*rest"), function(), Level.BREAKING),
    (function("*", "x"), function("x"), Level.ADDITION),
    (function("*", "x", "y"), function("*", "y", "x"), None),
    (function("x", returns="int | None"), function("x"), Level.ADDITION),
    ({"kind": "property"}, {"kind": "property that can be set"}, Level.ADDITION),
    ({"kind": "property that can be set"}, {"kind": "property"}, Level.BREAKING),
    ({"kind": "class", "bases": ["A"]}, {"kind": "class", "bases": []}, Level.BREAKING),
    ({"kind": "class", "bases": ["A"]}, {"kind": "class", "bases": ["A", "B"]}, Level.ADDITION),
    (
        {"kind": "class", "members": {"x": X, "y": X}},
        {"kind": "class", "members": {"x": X}},
        Level.BREAKING,
    ),
]


@pytest.mark.parametrize(("old", "new", "level"), LEVELS)
def test_a_change_is_told_by_what_it_asks_of_callers(
    old: dict[str, object], new: dict[str, object], level: Level | None
) -> None:
    changes = compare(face_of(name=old), face_of(name=new))
    assert max((change.level for change in changes), default=None) == level


def test_names_that_come_and_go_are_changes() -> None:
    assert [change.level for change in compare(face_of(x=X), face_of(x=X, y=X))] == [Level.ADDITION]
    gone, new = compare(face_of(x=X), face_of(y=X))
    assert str(gone) == "breaking  module.x: removed" and new.level is Level.ADDITION
    assert compare(face_of(x=X), {}) == [gone]


def test_the_version_rises_as_semantic_versioning_says() -> None:
    words = compare(face_of(x=X), face_of(x=function("x: int", doc="In words.")))
    new = compare(face_of(x=X), face_of(x=X, y=X))
    gone = compare(face_of(x=X), face_of())
    for released, versions in {
        "0.3.4": ("0.3.4", "0.3.5", "0.4.0", "0.4.0"),
        "1.3.4": ("1.3.4", "1.3.5", "1.4.0", "2.0.0"),
    }.items():
        changes = ([], words, new, gone)
        assert tuple(needed_version(released, each) for each in changes) == versions


@pytest.mark.parametrize("heading", ["## 0.3.0\n", "## [0.3.0] - 2027-01-01\n", "## 0.3.0"])
def test_a_version_with_a_heading_is_released(heading: str) -> None:
    assert is_released("0.3.0", CHANGELOG + heading)
    assert not is_released("0.3.0", CHANGELOG)
    assert not is_released("0.3", CHANGELOG + heading)
    assert not is_released("0.3.0", CHANGELOG + heading.replace("0.3.0", "0.3.0.1"))


def test_a_version_that_is_not_released_can_be_pinned_with_any_change(tmp_path: Path) -> None:
    assert check_pin(face_of(x=X), "0.3.0", tmp_path, CHANGELOG) is not None
    pin_face(face_of(x=X), "0.3.0", tmp_path, CHANGELOG)
    assert check_pin(face_of(x=X), "0.3.0", tmp_path, CHANGELOG) is None
    wrong = check_pin(face_of(), "0.3.0", tmp_path, CHANGELOG)
    assert wrong is not None and "breaking  module.x: removed" in wrong
    assert "0.3.0 will do" in wrong and wrong.endswith(public_face.COMMAND)
    pin_face(face_of(), "0.3.0", tmp_path, CHANGELOG)
    assert check_pin(face_of(), "0.3.0", tmp_path, CHANGELOG) is None
    assert not (tmp_path / RELEASED).exists()


def test_a_breaking_change_after_a_release_wants_a_higher_version(tmp_path: Path) -> None:
    pin_face(face_of(x=X), "0.3.0", tmp_path, CHANGELOG)
    changelog = CHANGELOG + "## 0.3.0\n"
    for version in ("0.3.0", "0.3.1"):
        wrong = check_pin(face_of(), version, tmp_path, changelog)
        assert wrong is not None and f"{version} is too low: " in wrong
        with pytest.raises(ValueError, match=rf"must be 0\.4\.0 or higher, and is {version}"):
            pin_face(face_of(), version, tmp_path, changelog)
    assert json.loads((tmp_path / PIN).read_text())["version"] == "0.3.0"
    pin_face(face_of(), "0.4.0", tmp_path, changelog)
    assert check_pin(face_of(), "0.4.0", tmp_path, changelog) is None


def test_a_pin_in_between_does_not_hide_what_broke_since_the_release(tmp_path: Path) -> None:
    pin_face(face_of(x=X), "0.3.0", tmp_path, CHANGELOG)
    changelog = CHANGELOG + "## 0.3.0\n"
    words = face_of(x=function("x: int", doc="In words."))
    pin_face(words, "0.3.1", tmp_path, changelog)
    with pytest.raises(ValueError, match=r"must be 0\.4\.0 or higher"):
        pin_face(face_of(), "0.3.1", tmp_path, changelog)
    # What comes and goes between two releases breaks nobody.
    pin_face(words | {"other": {"y": X}}, "0.4.0", tmp_path, changelog)
    pin_face(words, "0.3.1", tmp_path, changelog)
    wrong = check_pin(words, "0.3.0", tmp_path, changelog)
    assert wrong is not None and "the version was 0.3.1, is 0.3.0" in wrong
