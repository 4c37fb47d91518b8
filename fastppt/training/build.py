"""What a run trains, made from its configuration."""

from __future__ import annotations

import torch

from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.outputs.lora_files import read_lora_file
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables.trainables import Trainables
from fastppt.training.seeds import ADAPTER_STREAM, split_seed


def build_trainables(
    config: RunConfig, family: Family, dtype: torch.dtype = torch.float32
) -> Trainables:
    """Make all that moves in any stage of a run, and put it into the family's model.

    Args:
        config: Resolved.
        family: The loaded model.
        dtype: Of values and gradients; float32 unless arithmetic is being checked.

    Raises:
        UserError: a target matches nothing, or a LoRA file does not fit.
    """
    return Trainables(lora=_build_lora(config, family, dtype))


def _build_lora(config: RunConfig, family: Family, dtype: torch.dtype) -> LoraAdapters:
    """Put new adapters into the network, or those of ``lora.init``.

    Raises:
        UserError: a target matches nothing, or the file does not fit.
    """
    lora = config.stage[0].trainables.lora
    assert lora is not None
    weights = read_lora_file(lora.init, family) if lora.init is not None else None
    if lora.targets == "up":
        lora = lora.model_copy(update={"targets": list(family.second_half)})
    seed = split_seed(config.seed, ADAPTER_STREAM)
    adapters = LoraAdapters(
        family.make_adaptable(), lora, seed=seed, device=family.device, dtype=dtype
    )
    if weights is not None:
        try:
            adapters.load(weights)
        except UserError as error:
            raise UserError(f"LoRA {lora.init}: {error}") from None
    return adapters
