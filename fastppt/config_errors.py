"""What a user is told of a setting that is refused: the key, what is wanted, what was given."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from fastppt.config import RunConfig
from fastppt.config_types import section_type

# Letters of a value in a message.
SHOWN = 80

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


def explain(details: ErrorDetails) -> str:
    """Say one of pydantic's findings in a user's words: the key, what is wanted, what was given."""
    key = key_of(details)
    context = details.get("ctx", {})
    given = shown(details["input"])
    match details["type"]:
        case "extra_forbidden":
            section = _section_at(details["loc"][:-1])
            names = list(section.model_fields) if section is not None else []
            return f"unknown key {key}{did_you_mean(str(details['loc'][-1]), names)}"
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


def shown(value: object) -> str:
    """Return a value as Python writes it, cut where it is long or deep."""
    return _Shown().repr(value)


def key_of(details: ErrorDetails) -> str:
    """Return the dotted key that one of pydantic's findings is about."""
    # A key from a file may be as long as the file.
    return ".".join(str(part)[:SHOWN] for part in details["loc"])


def _section_at(location: Sequence[int | str]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = RunConfig
    for part in location:
        if isinstance(part, int) or section is None:
            continue
        field = section.model_fields.get(part)
        section = section_type(field.annotation) if field is not None else None
    return section


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """Return a question that names the known word nearest to the given one; empty without one."""
    near = difflib.get_close_matches(given[:SHOWN], known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
