"""What a run has trained, put into a stock pipeline of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.families.lora_keys import FAMILY_KEY, LAYOUTS
from fastppt.families.names import PIPELINES, family_of_pipeline
from fastppt.outputs.adapters import Adapter, LoraFile
from fastppt.outputs.embeddings import Embedding, embedding_name, read_embedding
from fastppt.outputs.finished import CONFIG_FILE, run_config_of
from fastppt.outputs.lora_files import DIFFUSERS_FILE, has_lora
from fastppt.outputs.lora_forms import read_lora
from fastppt.outputs.lora_metadata import learned_word
from fastppt.outputs.network_files import family_of_network, put_network_
from fastppt.outputs.results import check_libraries
from fastppt.trainables.trainables import LORA

Pipeline = TypeVar("Pipeline")


class OtherNetworkError(UserError):
    """A run's LoRA is of a network of other layers or widths."""


def load(pipe: Pipeline, run: Path) -> Pipeline:
    """Put what a run has trained into a pipeline, as `fastppt.load` says."""
    config = run_config_of(run) if run.is_dir() else None
    if config is None or config.output is None:
        raise UserError(
            f"{run}: is no folder of a run (no {CONFIG_FILE} in it), nor one of its checkpoints"
        )
    family = family_of_pipeline(type(pipe).__name__)
    if family is None:
        known = ", ".join(name for names in PIPELINES.values() for name in names)
        raise UserError(f"{run}: cannot be put into a {type(pipe).__name__}; fastppt knows {known}")
    files = _read_files(run, config)
    for name, told in files.families.items():
        if told not in (None, family):
            raise UserError(
                f"{run}: {name} is of the family {told}, and the pipeline, a "
                f"{type(pipe).__name__}, of the family {family}; the run trained "
                f"{config.model.path}"
            )
    component = LAYOUTS[family].components[0]
    if config.network not in (None, LORA):
        network = getattr(pipe, component)
        if any(parameter.is_meta for parameter in network.parameters()):
            raise UserError(
                f"{run}: the pipeline keeps its weights elsewhere; load the run before "
                "enable_sequential_cpu_offload"
            )
        put_network_(network, component, run, config)
    if files.lora is not None:
        check_lora_fits(getattr(pipe, component), files.lora.components.get(component, {}), run)
        load_lora: Any = pipe
        load_lora.load_lora_weights(str(run), weight_name=DIFFUSERS_FILE)
    if files.embedding is not None:
        teach_word(pipe, files.embedding)
    return pipe


def check_lora_fits(network: nn.Module, adapters: Mapping[str, Adapter], run: Path) -> None:
    """Refuse a LoRA of another network, before anything is added to it.

    Args:
        network: A pipeline's, with adapters or without.
        adapters: The LoRA's, by module path.
        run: The folder, for messages.

    Raises:
        OtherNetworkError: the network has no such layer, or one of other widths.
    """
    layers = dict(network.named_modules())
    for path, one in adapters.items():
        if path not in layers:
            raise OtherNetworkError(
                f"{run}: its LoRA adapts {path}, and this network has no such layer"
            )
        wanted = one.up.shape[0], one.down.shape[1]
        found = tuple(layers[path].weight.shape[:2])
        if found != wanted:
            raise OtherNetworkError(
                f"{run}: its LoRA adapts {path} as a layer of {wanted[1]} to {wanted[0]} values, "
                f"and in this network it is of {found[1]} to {found[0]}; is it the run's model?"
            )


@dataclass(frozen=True)
class _Files:
    """What of a run is put into a pipeline beside its network.

    Attributes:
        families: The family that each file names, as far as it does.
        lora: The LoRA.
        embedding: The learned word.
    """

    families: dict[str, str | None]
    lora: LoraFile | None
    embedding: Embedding | None


def _read_files(run: Path, config: RunConfig) -> _Files:
    """Look at all files before any is used.

    Raises:
        UserError: one is missing or cannot be read, or the library that it takes is not there.
    """
    check_libraries(config)
    families: dict[str, str | None] = {}
    lora, embedding = None, None
    if config.network not in (None, LORA):
        families["its network"] = family_of_network(run, config)
    if has_lora(config):
        if find_spec("peft") is None:
            raise UserError(
                f"{run}: diffusers loads its LoRA by the library peft: pip install peft"
            )
        if not (run / DIFFUSERS_FILE).is_file():
            raise UserError(f"{run}: there is no {DIFFUSERS_FILE}; is the run finished?")
        lora = read_lora(run / DIFFUSERS_FILE)
        families["its LoRA"] = lora.detection.family
    word = learned_word(config)
    if word is not None:
        embedding = read_embedding(run / embedding_name(word))
        families["its word"] = embedding.metadata.get(FAMILY_KEY)
    return _Files(families, lora, embedding)


def teach_word(pipe: Any, embedding: Embedding) -> None:
    """Teach a pipeline's text encoders a learned word.

    Raises:
        UserError: a tokenizer knows the word already, or the vectors have another width.
    """
    for component, rows in embedding.rows.items():
        tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"))
        encoder = getattr(pipe, component)
        width = encoder.get_input_embeddings().embedding_dim
        if width != rows.shape[1]:
            raise UserError(
                f"word {embedding.word}: has vectors of width {rows.shape[1]}, and the {component} "
                f"takes {width}; it was learned on another model"
            )
        # A word of several vectors is known by as many names, as diffusers gives them.
        names = [
            embedding.word,
            *(f"{embedding.word}_{number}" for number in range(1, len(rows))),
        ]
        known = tokenizer.get_vocab()
        if any(name in known for name in names):
            raise UserError(f"word {embedding.word}: is in the {component}'s tokenizer already")
        tokenizer.add_tokens(names)
        encoder.resize_token_embeddings(len(tokenizer))
        table = encoder.get_input_embeddings().weight
        with torch.no_grad():
            table[tokenizer.convert_tokens_to_ids(names)] = rows.to(table)
