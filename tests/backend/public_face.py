"""The public face of both packages, pinned in a file: `python -m tests.backend.public_face`.

The command pins the face anew. `public_face.json` is the face as pinned, with the version that it
was pinned under; `public_face_released.json` is that of the last release, once there is one. A
version is released when CHANGELOG.md has a heading of its number. What changed since the last
release says how far the version must rise, and a version that is too low is not pinned.

Public are the names that the modules of FACES list: arguments with their defaults and with their
annotations as the source has them, docstrings, and of classes the public methods, properties and
attributes, those of our base classes included. So is every class of ours that is named where
something is returned.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from tests.backend.face_changes import (
    SETTABLE,
    Entry,
    Face,
    compare,
    is_released,
    why_too_low,
)

ROOT = Path(__file__).parents[2]
PIN = "public_face.json"
RELEASED = "public_face_released.json"
COMMAND = "python -m tests.backend.public_face"
# The modules whose `__all__` is a promise; a name in two of them is described in the first.
FACES = ("fastppt_kernels", "fastppt.backend", "fastppt")
PACKAGES = ("fastppt", "fastppt_kernels")
# Methods that are called without their name.
SPOKEN = ("__call__", "__enter__", "__exit__")
DECORATORS = {
    "property": "property",
    "cached_property": "property",
    "staticmethod": "static method",
    "classmethod": "class method",
    "contextmanager": "context manager",
}


def read_face(modules: tuple[str, ...] = FACES) -> Face:
    """Return the face of modules, and under "returned" the classes that they only hand out."""
    face: Face = {}
    seen: dict[int, str] = {}
    waiting = []
    for module in modules:
        names = importlib.import_module(module)
        face[module] = {}
        for name in sorted(names.__all__):
            value = getattr(names, name)
            waiting.append(value)
            known = seen.get(id(value)) if callable(value) else None
            face[module][name] = {"kind": "alias", "of": known} if known else describe(value)
            seen.setdefault(id(value), f"{module}.{name}")
    returned: dict[str, Entry] = {}
    while waiting:
        for cls in classes_returned(waiting.pop()):
            if id(cls) not in seen:
                seen[id(cls)] = cls.__name__
                returned[cls.__name__] = describe(cls)
                waiting.append(cls)
    return face | {"returned": dict(sorted(returned.items()))}


def describe(value: object) -> Entry:
    """Return the entry of a class, a function, or any other value."""
    if inspect.isclass(value):
        return describe_class(value)
    if inspect.isroutine(value):
        return describe_function(value, is_bound=False)
    return {"kind": "value", "type": type(value).__name__}


def source_of(value: Any) -> Any:
    """Return the syntax tree of a class or of a function behind its decorators."""
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(value)))).body[0]


def lines(text: str | None) -> list[str]:
    return inspect.cleandoc(text or "").splitlines()


def describe_function(function: Any, *, is_bound: bool) -> Entry:
    node = source_of(function)
    decorators = [ast.unparse(each).rpartition(".")[2] for each in node.decorator_list]
    kind = next((DECORATORS[each] for each in decorators if each in DECORATORS), "function")
    values = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
    }
    return {
        "kind": kind,
        "arguments": arguments(node.args, values, skip=is_bound and kind != "static method"),
        "returns": ast.unparse(node.returns) if node.returns else "",
        "doc": lines(ast.get_docstring(node)),
    }


def arguments(node: ast.arguments, values: dict[str, object], *, skip: bool) -> list[str]:
    """Return arguments as they stand between a function's brackets, without ``self``."""
    positional = [*node.posonlyargs, *node.args]
    defaults = [None] * (len(positional) - len(node.defaults)) + node.defaults
    texts = [argument(*each, values) for each in zip(positional, defaults, strict=True)]
    if node.posonlyargs:
        texts.insert(len(node.posonlyargs), "/")
    texts = texts[1:] if skip else texts
    if node.vararg or node.kwonlyargs:
        texts.append("*" + (argument(node.vararg, None, values) if node.vararg else ""))
    texts += [
        argument(*each, values) for each in zip(node.kwonlyargs, node.kw_defaults, strict=True)
    ]
    return texts + (["**" + argument(node.kwarg, None, values)] if node.kwarg else [])


def argument(node: ast.arg, default: ast.expr | None, values: dict[str, object]) -> str:
    annotation = f": {ast.unparse(node.annotation)}" if node.annotation else ""
    return node.arg + annotation + (f" = {literal(values[node.arg], default)}" if default else "")


def literal(value: object, source: ast.expr | None = None) -> str:
    """Return a default's value where Python can read it again, else its name in the source."""
    try:
        ast.literal_eval(repr(value))
    except (ValueError, SyntaxError):
        return ast.unparse(source) if source else type(value).__name__
    return repr(value)


def our_bases(cls: type) -> list[type]:
    """Return a class and those of its bases that are ours, the furthest first."""
    return [each for each in reversed(cls.__mro__) if each.__module__.split(".")[0] in PACKAGES]


def describe_class(cls: type) -> Entry:
    members: dict[str, Entry] = {}
    made: list[str] | None = None
    fields: dict[str, str] = {}
    for base in our_bases(cls):
        for node in source_of(base).body:
            if isinstance(node, ast.AnnAssign):
                fields[ast.unparse(node.target)] = ast.unparse(node.annotation)
            elif isinstance(node, ast.FunctionDef) and node.name == "__init__":
                made = describe_function(base.__init__, is_bound=True)["arguments"]
                fields |= assigned(node)
            elif isinstance(node, ast.FunctionDef) and is_public(node.name):
                member(members, node, inspect.getattr_static(base, node.name))
    for name, annotation in fields.items():
        if is_public(name):
            members.setdefault(name, {"kind": "attribute", "annotation": annotation})
    return {
        "kind": "class",
        "bases": [ast.unparse(base) for base in source_of(cls).bases],
        "arguments": generated_arguments(cls, fields) if made is None else made,
        "doc": lines(ast.get_docstring(source_of(cls))),
        "members": dict(sorted(members.items())),
    }


def is_public(name: str) -> bool:
    return not name.startswith("_") or name in SPOKEN


def member(members: dict[str, Entry], node: ast.FunctionDef, value: Any) -> None:
    """Add a method, or what a property is."""
    decorators = [ast.unparse(each) for each in node.decorator_list]
    if f"{node.name}.setter" in decorators:
        members[node.name]["kind"] = SETTABLE
    else:
        function = getattr(value, "fget", None) or getattr(value, "func", None) or value
        function = getattr(function, "__func__", function)
        members[node.name] = describe_function(function, is_bound=True)


def assigned(init: ast.FunctionDef) -> dict[str, str]:
    """Return the attributes that ``__init__`` sets on its object, with their annotations."""
    found = {}
    for node in ast.walk(init):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                text = ast.unparse(target)
                if re.fullmatch(r"self\.\w+", text):
                    found[text.removeprefix("self.")] = annotation
    return found


def generated_arguments(cls: type, fields: dict[str, str]) -> list[str]:
    """Return the arguments of a class without an ``__init__`` of its own: a dataclass, say."""
    texts, is_keyword = [], False
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and not is_keyword:
            texts.append("*")
            is_keyword = True
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f" = {literal(parameter.default)}"
        texts.append(star + name + (f": {fields[name]}" if name in fields else "") + default)
    return texts


def classes_returned(value: Any) -> list[type]:
    """Return the classes of ours that annotations of returns and attributes name."""
    if inspect.isclass(value):
        entry = describe_class(value)
        texts = [each.get("returns", "") for each in entry["members"].values()]
        texts += [each.get("annotation", "") for each in entry["members"].values()]
    elif inspect.isroutine(value):
        texts = [describe_function(value, is_bound=False)["returns"]]
    else:
        return []
    names = vars(sys.modules[inspect.unwrap(value).__module__])
    found = [names.get(each) for text in texts for each in re.findall(r"\w+", text)]
    return [each for each in found if inspect.isclass(each) and our_bases(each)[-1:] == [each]]


def read_pin(path: Path) -> tuple[str, Face] | None:
    """Return version and face of a pin; None where there is none."""
    if not path.exists():
        return None
    pin = json.loads(path.read_text(encoding="utf-8"))
    return pin["version"], pin["face"]


def last_release(folder: Path, changelog: str) -> tuple[str, Face] | None:
    """Return the last release: the pin, if its version is out by now, else the one kept."""
    pin = read_pin(folder / PIN)
    if pin is not None and is_released(pin[0], changelog):
        return pin
    return read_pin(folder / RELEASED)


def check_version(face: Face, version: str, folder: Path, changelog: str) -> str | None:
    """Return why a face cannot have this version; None if it can."""
    release = last_release(folder, changelog)
    return release and why_too_low(version, release[0], compare(release[1], face))


def check_pin(face: Face, version: str, folder: Path, changelog: str) -> str | None:
    """Return what is wrong with the pin in a folder, and the mend; None if all is well."""
    too_low = check_version(face, version, folder, changelog)
    pin = read_pin(folder / PIN)
    changes = compare(pin[1], face) if pin else []
    if pin and not changes and pin[0] == version:
        return too_low
    what = "\n  ".join(["the public face is not as pinned:", *map(str, changes)])
    if pin and pin[0] != version:
        what += f"\n  the version was {pin[0]}, is {version}"
    how = f"If that is meant: {COMMAND}"
    rule = (
        "A breaking change raises the major (the minor while the major is 0), an addition the "
        f"minor, a wording the patch; {version} "
    )
    return "\n".join([what, f"{rule}is too low: {too_low}" if too_low else f"{rule}will do", how])


def pin_face(face: Face, version: str, folder: Path, changelog: str) -> None:
    """Write the pin, and keep the one of a version that has been released since.

    Raises:
        ValueError: The version is too low for what has changed since the last release.
    """
    too_low = check_version(face, version, folder, changelog)
    if too_low is not None:
        raise ValueError(too_low)
    release = last_release(folder, changelog)
    for name, pin in ((RELEASED, release), (PIN, (version, face))):
        if pin is not None:
            text = json.dumps({"version": pin[0], "face": pin[1]}, indent=1, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Pin the face of the source."""
    import fastppt

    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    try:
        pin_face(read_face(), fastppt.__version__, Path(__file__).parent, changelog)
    except ValueError as error:
        sys.exit(f"not pinned: {error}")
    print(f"pinned under version {fastppt.__version__}: {Path(__file__).with_name(PIN)}")


if __name__ == "__main__":
    main()
