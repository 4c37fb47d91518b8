"""What the tables of a configuration are made of."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

T = TypeVar("T", Path, str)


def _check_path(path: T) -> T:
    if "\0" in str(path):
        raise ValueError("must not hold the character NUL, which no file name can")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{str(path)!r} is not text in UTF-8; rename it") from None
    return path


# Text in a TOML file; the one type that is converted.
FilePath = Annotated[Path, Field(strict=False), AfterValidator(_check_path)]
# A path, or a name at the hub.
Place = Annotated[str, Field(min_length=1), AfterValidator(_check_path)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Engine = Literal["auto", "eager", "compile", "graph", "graph+compile"]
CompileScope = Literal["blocks", "network"]
AnchorForm = Literal["raw", "effective", "decoupled"]
# Where the pretrained weights are kept beside trained ones.
Storage = Literal["device", "host"]


class Section(BaseModel):
    """One table of the TOML file. Unknown keys are refused, values never change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @field_validator("*", check_fields=False)
    @classmethod
    def _check_size(cls, value: object) -> object:
        # Nor could a TOML file take back a number of thousands of digits.
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("must be below 2^63")
        return value


def section_type(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds: itself, optional, or the items of its list."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    for argument in get_args(annotation):
        found = section_type(argument)
        if found is not None:
            return found
    return None
