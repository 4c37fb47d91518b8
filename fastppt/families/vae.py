"""Another VAE than the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from fastppt.errors import UserError
from fastppt.families.checkpoints import (
    LOADING_ERRORS,
    SUFFIX,
    check_configs,
    check_folder,
    check_weights,
    read_shapes,
    refuse_pickle,
    without_cast_warnings,
)

# What the network has learned to see: a VAE that differs in one of them makes other latents.
LATENT_KEYS = ("latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std")


def load_vae(name: str, own_config: Mapping[str, Any], dtype: torch.dtype) -> AutoencoderKL:
    """Load ``model.vae`` and check that its latents are those of the model's own VAE.

    Args:
        name: Hub id, folder of a VAE, diffusers folder, or .safetensors file in the original or
            in diffusers' layout. A file takes the configuration of the model's own VAE.
        own_config: Configuration of the model's own VAE.
        dtype: Of the VAE.

    Raises:
        UserError: it cannot be found or read, is not whole, or makes other latents.
    """
    path = Path(name)
    refuse_pickle(path)
    num_values = {}
    try:
        if path.is_file():
            vae = _load_file(path, own_config, dtype)
        elif path.is_dir():
            parent, component = (
                (path, "vae") if (path / "vae").is_dir() else (path.parent, path.name)
            )
            check_configs(parent, [component])
            num_values = {"VAE": check_folder(parent, [component], None)[component]}
            vae = _from_pretrained(str(parent / component), dtype)
        elif path.suffix == SUFFIX:
            raise UserError(f"model.vae {name}: there is no such file")
        else:
            vae = _load_hub(name, dtype)
    except UserError:
        raise
    except (*LOADING_ERRORS, SingleFileComponentError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model.vae {name}: cannot be loaded ({reason})") from error
    check_weights(f"model.vae {name}", {"VAE": vae}, num_values)
    _check_latents(name, vae, own_config)
    return vae


def _load_file(file: Path, own_config: Mapping[str, Any], dtype: torch.dtype) -> AutoencoderKL:
    read_shapes(file)
    with TemporaryDirectory() as folder, without_cast_warnings():
        AutoencoderKL.from_config(dict(own_config)).save_config(folder)
        return AutoencoderKL.from_single_file(
            str(file), config=folder, dtype=dtype, local_files_only=True
        )


def _load_hub(name: str, dtype: torch.dtype) -> AutoencoderKL:
    try:
        hf_hub_download(name, "config.json")
    except EntryNotFoundError:
        # Not a VAE's own repository: that of a whole model.
        hf_hub_download(name, "vae/config.json")
        return _from_pretrained(name, dtype, subfolder="vae")
    return _from_pretrained(name, dtype)


def _from_pretrained(place: str, dtype: torch.dtype, **options: str) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(place, dtype=dtype, use_safetensors=True, **options)


def _check_latents(name: str, vae: AutoencoderKL, own_config: Mapping[str, Any]) -> None:
    with torch.device("meta"):
        own = AutoencoderKL.from_config(dict(own_config))

    def facts(one: AutoencoderKL) -> dict[str, Any]:
        side = 2 ** (len(one.config.block_out_channels) - 1)
        return {"pixels a latent": side} | {key: one.config.get(key) for key in LATENT_KEYS}

    wanted = facts(own)
    for key, given in facts(vae).items():
        if given != wanted[key]:
            raise UserError(
                f"model.vae {name}: has {key} {given}, and the model's own VAE {wanted[key]}; "
                "give a VAE of the same family"
            )
