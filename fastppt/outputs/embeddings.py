"""Embedding files: a learned word, in the form that diffusers, ComfyUI and A1111 read.

Of one text encoder: a tensor [n, W] under the word itself; diffusers takes a single key for the
word, the others look at the tensor alone.
Of two: ``clip_l`` and ``clip_g``, [n, W] each.

ComfyUI and A1111 know an embedding by the name of its file, which is therefore made of the word.

Source: diffusers' ``loaders/textual_inversion.py``; ``load_embed`` of ComfyUI;
``create_embedding_from_data`` of A1111's ``textual_inversion.py``.

Shape legend: n vectors of the word, W width of a text encoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.lora_keys import EMBEDDING_FAMILIES, EMBEDDING_KEYS, FAMILY_KEY
from fastppt.outputs.adapters import DTYPES
from fastppt.outputs.files import write_file
from fastppt.outputs.lora_metadata import (
    BASE_KEY,
    WORD_KEY,
    file_content,
    learned_word,
    model_spec,
)

SUFFIX = ".safetensors"
# What sd-scripts writes for the word of a file of one tensor, and old files of A1111.
NAMELESS = ("emb_params", "*")
FLOATS = (torch.float64, *DTYPES.values())


@dataclass(frozen=True)
class Embedding:
    """A learned word.

    Attributes:
        word: As prompts say it.
        rows: By text encoder, as the pipeline calls it: [n, W], host.
        metadata: What the file says of itself.
    """

    word: str
    rows: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def num_vectors(self) -> int:
        """How many vectors the word is made of."""
        return len(next(iter(self.rows.values())))


def embedding_name(word: str) -> str:
    """Return the name of a word's file: letters and digits of the word, `<v>` giving `v`."""
    letters = re.sub(r"[^\w-]+", "", word)
    return f"{letters or 'embedding'}{SUFFIX}"


def write_embedding(
    folder: Path, config: RunConfig, family: Family, rows: Mapping[str, Tensor]
) -> Path:
    """Write the word that a run has learned.

    Args:
        folder: Where to.
        config: The run's, resolved; it trains a word.
        family: Whose text encoders read it.
        rows: By text encoder: [n, W].

    Returns:
        The file's path.
    """
    word = learned_word(config)
    assert word is not None
    path = folder / embedding_name(word)
    dtype = DTYPES[config.save_dtype]
    tensors = {
        EMBEDDING_KEYS[name] if len(rows) > 1 else word: row.detach()
        .to("cpu", dtype)
        .contiguous()
        .clone()
        for name, row in rows.items()
    }
    metadata = {"format": "pt", WORD_KEY: word} | {
        "fastppt.class_noun": str(config.prompts.class_noun),
        BASE_KEY: str(config.model.path),
        FAMILY_KEY: family.name,
    }
    metadata |= model_spec(config, family, path.stem, kind="/textual-inversion", trigger=word)
    write_file(path, file_content(tensors, metadata))
    return path


def read_embedding(path: Path) -> Embedding:
    """Read an embedding file of any program that writes .safetensors.

    The word is what the metadata say, else the key of a single tensor, else the file's name.

    Raises:
        UserError: it cannot be read, or is no embedding of one or two text encoders.
    """
    if path.suffix != SUFFIX:
        raise UserError(
            f"embedding {path}: must be a {SUFFIX} file (others can run code when read)"
        )
    try:
        with safe_open(path, "pt") as file:
            metadata, keys = dict(file.metadata() or {}), list(file.keys())
            tensors = {key: file.get_tensor(key) for key in keys if _has_keys(keys)}
    except (OSError, SafetensorError) as error:
        raise UserError(f"embedding {path}: cannot be read ({error}); is it whole?") from None
    metadata.pop("format", None)
    if not tensors:
        raise UserError(
            f"embedding {path}: holds {_some(keys)}; an embedding file holds one tensor, "
            f"or {' and '.join(EMBEDDING_KEYS.values())}"
        )
    _check_tensors(path, tensors)
    (key, first), *others = tensors.items()
    says_word = not others and key not in (*NAMELESS, *EMBEDDING_KEYS.values())
    word = metadata.get(WORD_KEY) or (key if says_word else "") or path.stem
    if not others:
        return Embedding(word, {"text_encoder": first.view(-1, first.shape[-1])}, metadata)
    return Embedding(word, {name: tensors[key] for name, key in EMBEDDING_KEYS.items()}, metadata)


def _check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what is not vectors, as many for each text encoder."""
    dims = (1, 2) if len(tensors) == 1 else (2,)
    for key, tensor in tensors.items():
        if tensor.ndim not in dims or tensor.numel() == 0 or tensor.dtype not in FLOATS:
            raise UserError(
                f"embedding {path}: {key} must be real numbers [vectors, width], is "
                f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            )
    if len({tensor.shape[0] for tensor in tensors.values()}) > 1:
        raise UserError(
            f"embedding {path}: must have as many vectors for each text encoder, has "
            + ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in tensors.items())
        )


def check_fits(path: Path, embedding: Embedding, family: Family) -> None:
    """Refuse an embedding of another model, or one that no prompt could hold.

    Raises:
        UserError: for other text encoders, or wider or narrower ones, than the family's; of more
            vectors than a prompt has places for.
    """
    given = {name: row.shape[1] for name, row in embedding.rows.items()}
    wanted = {
        name: clip.get_input_embeddings().embedding_dim for name, clip in family.text.clips.items()
    }
    if given != wanted:
        raise UserError(
            f"embedding {path}: has vectors of width {_widths(given)}, and the text encoders of "
            f"{family.model.path} ({family.name}) take {_widths(wanted)}; "
            "it was made for another model"
        )
    # The first place is the begin token's, the last the end token's.
    places = family.text.num_tokens - 2
    if embedding.num_vectors > places:
        raise UserError(
            f"embedding {path}: has {embedding.num_vectors} vectors, and a prompt of "
            f"{family.model.path} has places for {places}; is it the right file?"
        )


def is_embedding_file(path: Path) -> bool:
    """Return whether a file has the keys of an embedding; no if it cannot be read."""
    if path.is_dir():
        return False
    try:
        with safe_open(path, "pt") as file:
            return _has_keys(file.keys())
    except (OSError, SafetensorError):
        return False


def family_of(embedding: Embedding) -> str:
    """Return the model family, in words: as the metadata say, else what the widths leave."""
    if told := embedding.metadata.get(FAMILY_KEY):
        return told
    widths = tuple(row.shape[1] for row in embedding.rows.values())
    return EMBEDDING_FAMILIES.get(widths, "unknown")


def _has_keys(keys: Iterable[str]) -> bool:
    found = set(keys)
    one = len(found) == 1 and not any(".lora_" in key for key in found)
    return one or found == set(EMBEDDING_KEYS.values())


def _widths(widths: Mapping[str, int]) -> str:
    return ", ".join(f"{width} ({name})" for name, width in widths.items())


def _some(keys: list[str]) -> str:
    if not keys:
        return "no tensor"
    return f"{len(keys)} tensor{'s' * (len(keys) > 1)}, the first of them {keys[0]}"
