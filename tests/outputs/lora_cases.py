"""LoRA files for tests: random adapters on every layer that the forms can hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastppt.families.lora_keys import LAYOUTS, Detection, canonical_path
from fastppt.outputs.adapters import Adapter, LoraFile

FAMILIES = ("sd", "sdxl", "sd3")
# One in the fast tests, the others in the slow ones.
ONE_FAST = (
    pytest.param("sd", marks=pytest.mark.slow),
    "sdxl",
    pytest.param("sd3", marks=pytest.mark.slow),
)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "out_proj", "SelfAttention.q", "proj_in")


def random_lora(pipeline: Any, family: str, *, mixed: bool = True) -> LoraFile:
    """Adapters of every component of the family, of two ranks and three alphas if mixed."""
    generator = torch.Generator().manual_seed(3)
    adapters: dict[tuple[str, str], Adapter] = {}
    for component in LAYOUTS[family].components:
        for name, module in pipeline.components[component].named_modules():
            if not name.endswith(ATTENTION) or not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            number = len(adapters) if mixed else 0
            rank, alpha = (4, 2)[number % 2], (4.0, 6.0, 0.1)[number % 3] if mixed else 4.0
            out, into, *kernel = module.weight.shape
            down = 0.3 * torch.randn(rank, into, *kernel, generator=generator)
            up = 0.3 * torch.randn(out, rank, *kernel, generator=generator)
            adapters[component, canonical_path(component, name)] = Adapter(down, up, alpha)
    metadata = {"ss_output_name": "a robot", "modelspec.title": "a robot", "mine": "kept"}
    if family != "sd3":
        version = {"sd": "sd_v1", "sdxl": "sdxl_base_v1-0"}[family]
        metadata["ss_base_model_version"] = version
    return LoraFile(adapters, metadata, "diffusers", Detection(family, "made so"))


def change(adapter: Adapter) -> Tensor:
    """What the adapter adds to the layer's weight, in its shape, float64."""
    product = adapter.up.double().flatten(1) @ adapter.down.double().flatten(1)
    return adapter.alpha / adapter.down.shape[0] * product


def peft_changes(module: nn.Module) -> dict[str, Tensor]:
    """What peft's adapters in a module add to each layer's weight, float64."""
    changes = {}
    for name, layer in module.named_modules():
        if hasattr(layer, "lora_A") and len(layer.lora_A):
            (adapter,) = layer.lora_A
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            product = up.detach().double().flatten(1) @ down.detach().double().flatten(1)
            path = name.removeprefix("base_model.model.")
            changes[path] = layer.scaling[adapter] * product
    return changes
