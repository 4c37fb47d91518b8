"""What a run trains, made from its configuration."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.outputs.embeddings import read_embedding
from fastppt.outputs.lora_files import LoraWeights, read_lora_file
from fastppt.outputs.lora_metadata import learned_word
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables.network_weights import NetworkWeights
from fastppt.trainables.peft_tuners import PeftAdapters
from fastppt.trainables.svdiff import SpectralShifts
from fastppt.trainables.tokens import LearnedTokens
from fastppt.trainables.trainable import Trainable
from fastppt.trainables.trainables import LORA, TEXT_ENCODER_LORA, Trainables
from fastppt.trainables_config import (
    ADAPTER_TRAINABLES,
    AdapterConfig,
    CustomDiffusionConfig,
    FullConfig,
    LoraConfig,
    NetworkWeightsConfig,
    SvdiffConfig,
    TextEncoderLoraConfig,
    TokensConfig,
)
from fastppt.training.seeds import ADAPTER_STREAM, TEXT_ADAPTER_STREAM, split_seed

logger = logging.getLogger(__name__)


def build_trainables(
    config: RunConfig, family: Family, dtype: torch.dtype = torch.float32
) -> Trainables:
    """Make all that moves in any stage of a run, and put it into the family's model.

    Args:
        config: Resolved.
        family: The loaded model.
        dtype: Of values and gradients; float32 unless arithmetic is being checked.

    Raises:
        UserError: a target matches nothing, a LoRA file does not fit, or the new word is none.
    """
    weights = _read_init(config, family)
    parts: dict[str, Trainable] = {}
    for name, (index, table) in config.trainables.items():
        key = f"stage.{index}.trainables.{name}"
        match table:
            case LoraConfig():
                parts[name] = _build_lora(config, table, family, weights, dtype, key)
            case TextEncoderLoraConfig():
                parts[name] = _build_text_lora(config, table, family, weights, dtype, key)
            case TokensConfig():
                parts[name] = _build_tokens(config, table, family, weights, dtype, key)
            case FullConfig():
                parts[name] = _build_weights(config, table, table.targets, family, dtype, key)
            case CustomDiffusionConfig():
                parts[name] = _build_weights(config, table, family.text_weights, family, dtype, key)
            case SvdiffConfig():
                parts[name] = SpectralShifts(
                    family.network,
                    table,
                    unread=family.unread_projections,
                    device=family.device,
                    dtype=dtype,
                    key=key,
                )
            case AdapterConfig():
                parts[name] = _build_peft(config, table, family, dtype, key)
            case _:
                raise NotImplementedError(name)
    if not parts.keys() & {*ADAPTER_TRAINABLES}:
        # Attention looks at text, for the alignments, and runs by the model's backend all the same.
        family.make_adaptable()
    return Trainables(parts)


def without_init(config: RunConfig) -> RunConfig:
    """Return the configuration of adapters that start from no file: their values come later."""
    stages = []
    for stage in config.stage:
        lora = stage.trainables.lora
        if lora is not None:
            lora = lora.model_copy(update={"init": None})
        trainables = stage.trainables.model_copy(update={"lora": lora})
        stages.append(stage.model_copy(update={"trainables": trainables}))
    return config.model_copy(update={"stage": stages})


def _read_init(config: RunConfig, family: Family) -> LoraWeights | None:
    """Read the LoRA file that a run starts from, if there is one."""
    _, lora = config.trainables.get(LORA, (0, None))
    if not isinstance(lora, LoraConfig) or lora.init is None:
        return None
    text = TEXT_ENCODER_LORA in config.trainables
    weights = read_lora_file(lora.init, family, text=text)
    if weights.word not in (None, learned_word(config)):
        logger.warning(
            "LoRA %s: goes with the learned word %s, which this run does not train; "
            "its embedding is left out",
            weights.file,
            weights.word,
        )
    return weights


def _build_lora(
    config: RunConfig,
    lora: LoraConfig,
    family: Family,
    weights: LoraWeights | None,
    dtype: torch.dtype,
    key: str,
) -> LoraAdapters:
    """Put new adapters into the network, or those of ``lora.init``."""
    if lora.targets == "up":
        lora = lora.model_copy(update={"targets": list(family.second_half)})
    seed = split_seed(config.seed, ADAPTER_STREAM)
    adapters = LoraAdapters(
        family.make_adaptable(), lora, seed=seed, device=family.device, dtype=dtype, key=key
    )
    if weights is not None:
        _load(adapters, weights.network, weights.file)
    return adapters


def _build_weights(
    config: RunConfig,
    settings: NetworkWeightsConfig,
    targets: Sequence[str] | None,
    family: Family,
    dtype: torch.dtype,
    key: str,
) -> NetworkWeights:
    """Take the network's own weights into an arena, those that the targets choose."""
    return NetworkWeights(
        family.network,
        targets,
        master_weights=settings.master_weights,
        kept=config.kept_weights,
        dtype=dtype,
        key=key,
    )


def _build_peft(
    config: RunConfig, table: AdapterConfig, family: Family, dtype: torch.dtype, key: str
) -> PeftAdapters:
    """Put new adapters of another kind than LoRA into the network."""
    return PeftAdapters(
        family.make_adaptable(),
        table,
        seed=split_seed(config.seed, ADAPTER_STREAM),
        device=family.device,
        dtype=dtype,
        key=key,
    )


def _build_text_lora(
    config: RunConfig,
    settings: TextEncoderLoraConfig,
    family: Family,
    weights: LoraWeights | None,
    dtype: torch.dtype,
    key: str,
) -> LoraAdapters:
    """Put new adapters into the text encoders, or those of ``lora.init`` where it has some."""
    adapters = LoraAdapters(
        family.text.make_adaptable(family.unread_projections),
        LoraConfig(rank=settings.rank, alpha=settings.alpha),
        seed=split_seed(config.seed, TEXT_ADAPTER_STREAM),
        device=family.device,
        dtype=dtype,
        key=key,
    )
    if weights is not None and weights.text:
        _load(adapters, weights.text, weights.file)
    return adapters


def _build_tokens(
    config: RunConfig,
    settings: TokensConfig,
    family: Family,
    weights: LoraWeights | None,
    dtype: torch.dtype,
    key: str,
) -> LearnedTokens:
    """Teach the text encoders the new word, as ``lora.init`` left it if it goes with that word."""
    tokens = LearnedTokens(
        family.text,
        config.prompts.token,
        vectors=settings.vectors,
        init=settings.init or config.prompts.class_noun,
        device=family.device,
        dtype=dtype,
        key=key,
    )
    if weights is not None and weights.word_file is not None and weights.word == tokens.word:
        try:
            tokens.load(read_embedding(weights.word_file).rows)
        except UserError as error:
            raise UserError(f"LoRA {weights.file}, word {tokens.word}: {error}") from None
    return tokens


def _load(
    adapters: LoraAdapters, weights: Mapping[str, tuple[Tensor, Tensor, float]], file: Path
) -> None:
    try:
        adapters.load(weights)
    except UserError as error:
        raise UserError(f"LoRA {file}: {error}") from None
