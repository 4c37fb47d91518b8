"""How large a model is, from the headers of its files."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.checkpoints import (
    JOINT_BLOCK,
    NETWORK,
    VAE_PREFIXES,
    check_configs,
    check_folder,
    read_shapes,
)
from fastppt.families.names import COMPONENTS, LARGE_TEXT_ENCODERS
from fastppt.families.sources import check_files, source_of

# Keys of single-file checkpoints that belong to text encoders, and those of the largest.
TEXT_PREFIXES = ("cond_stage_model.", "conditioner.", "text_encoders.")
LARGE_TEXT_PREFIX = "text_encoders.t5xxl."
# One table under two keys, where a file has both.
TWINS = tuple(
    f"{LARGE_TEXT_PREFIX}transformer.{key}"
    for key in ("shared.weight", "encoder.embed_tokens.weight")
)


@dataclass(frozen=True)
class WeightCount:
    """How many values each part of a model holds."""

    network: int
    text_encoders: int
    vae: int

    def num_bytes(self, dtype: torch.dtype) -> dict[str, int]:
        """Return the bytes of each part in training: all in dtype, the VAE in float32 at least."""
        precise = torch.promote_types(dtype, torch.float32)
        return {
            "network": self.network * dtype.itemsize,
            "text encoders": self.text_encoders * dtype.itemsize,
            "VAE": self.vae * precise.itemsize,
        }


def count_weights(model: ModelConfig, family: str) -> WeightCount | None:
    """Count the weights that a run would load, reading headers alone.

    Args:
        model: Has passed `detect_family`.
        family: What that said.

    Returns:
        None where a part of it is on the hub and not, or not whole, in the cache.

    Raises:
        UserError: a file is missing or not whole.
    """
    assert model.path is not None
    match source_of(model.path):
        case "mini model":
            count = _count_mini(model, family)
        case "single file":
            count = _count_single_file(model, family)
        case "diffusers folder":
            count = _count_components(check_files(model, Path(model.path), family))
        case "hub id":
            folder = cached_folder(model.path, model.revision)
            if folder is None:
                return None
            try:
                count = _count_components(check_files(model, folder, family))
            except UserError:
                if _is_offline():
                    raise
                return None
    if model.vae is None:
        return count
    vae = _count_vae(model.vae)
    return None if vae is None else WeightCount(count.network, count.text_encoders, vae)


def _count_mini(model: ModelConfig, family: str) -> WeightCount:
    from fastppt.mini import build_mini

    assert model.path is not None
    dropped = () if model.large_text_encoder else LARGE_TEXT_ENCODERS[family]
    num_values = {}
    for name, part in build_mini(model.path).components.items():
        if isinstance(part, torch.nn.Module) and name not in dropped:
            # By address: some encoders name one table twice.
            sizes = {tensor.data_ptr(): tensor.numel() for tensor in part.state_dict().values()}
            num_values[name] = sum(sizes.values())
    return _count_components(num_values)


def _count_components(num_values: dict[str, int]) -> WeightCount:
    """Sum the values of a pipeline's components; the network is what is neither text nor VAE."""
    text = sum(count for name, count in num_values.items() if name.startswith("text_encoder"))
    vae = num_values.get("vae", 0)
    return WeightCount(sum(num_values.values()) - text - vae, text, vae)


def _count_single_file(model: ModelConfig, family: str) -> WeightCount:
    assert model.path is not None
    dropped = () if model.large_text_encoder else LARGE_TEXT_ENCODERS[family]
    if model.config_folder is not None:
        used = [name for name in COMPONENTS[family] if name not in dropped]
        check_configs(model.config_folder, used)
    shapes = read_shapes(Path(model.path))
    if all(key in shapes for key in TWINS):
        del shapes[TWINS[1]]
    # Some authors publish the network's keys without a prefix.
    bare = JOINT_BLOCK in shapes
    network = text = vae = 0
    for key, shape in shapes.items():
        if key.startswith(VAE_PREFIXES):
            vae += prod(shape)
        elif key.startswith(TEXT_PREFIXES):
            text += prod(shape) if not dropped or not key.startswith(LARGE_TEXT_PREFIX) else 0
        elif bare or key.startswith(NETWORK):
            network += prod(shape)
    return WeightCount(network, text, vae)


def _count_vae(name: str) -> int | None:
    """Count the values of ``model.vae``; None if it is on the hub and not in the cache."""
    path = Path(name)
    if path.is_file():
        return sum(prod(shape) for shape in read_shapes(path).values())
    folder = path if path.is_dir() else cached_folder(name, None)
    if folder is None:
        return None
    component = folder / "vae" if (folder / "vae").is_dir() else folder
    return check_folder(component.parent, [component.name], None)[component.name]


def cached_folder(hub_id: str, revision: str | None) -> Path | None:
    """Return the folder of a hub id in the hub's cache; None if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _is_offline() -> bool:
    from huggingface_hub import is_offline_mode

    return is_offline_mode()
