"""From what the user calls a model to its stock diffusers pipeline."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.checkpoints import (
    LOADING_ERRORS,
    SUFFIX,
    check_configs,
    check_folder,
    check_marks,
    check_weights,
    read_shapes,
    refuse_pickle,
    without_cast_warnings,
)
from fastppt.families.names import (
    COMPONENTS,
    LARGE_TEXT_ENCODERS,
    MINI_MODELS,
    PIPELINE_OPTIONS,
    PIPELINES,
)

Source = Literal["mini model", "single file", "diffusers folder", "hub id"]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
INDEX = "model_index.json"
# Where the classes of a model's parts may come from.
LIBRARIES = ("diffusers", "transformers")
HUB_HINT = "; is its name right, and is the hub within reach?"


def source_of(path: str) -> Source:
    """Say what ``model.path`` is.

    Raises:
        UserError: a pickle, a file of another kind, or none of what a model can be.
    """
    file = Path(path)
    if path in MINI_MODELS:
        return "mini model"
    if file.is_dir():
        return "diffusers folder"
    refuse_pickle(file)
    if file.is_file():
        if file.suffix != SUFFIX:
            raise UserError(
                f"model {path}: is a file; give a {SUFFIX} checkpoint, a diffusers folder "
                "or a hub id"
            )
        return "single file"
    if file.suffix == SUFFIX:
        raise UserError(f"model {path}: there is no such file")
    if not HUB_ID.fullmatch(path):
        raise UserError(
            f"model {path}: is no file, no folder, no hub id (owner/name), "
            f"and none of {', '.join(MINI_MODELS)}"
        )
    return "hub id"


def read_index(folder: Path) -> dict[str, Any]:
    """Return the model_index.json of a diffusers folder.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"model {folder}: is no diffusers folder (no {INDEX})") from None
    except (OSError, ValueError):
        index = None
    if not isinstance(index, dict):
        raise UserError(f"model {folder}: {INDEX} cannot be read as JSON")
    return index


def cannot_load(model: ModelConfig, error: Exception, hint: str = "") -> UserError:
    """Return the error that tells a user what a library said."""
    reason = " ".join(str(error).split())
    return UserError(f"model {model.path}: cannot be loaded ({reason}){hint}")


def load_pipeline(
    model: ModelConfig,
    family: str,
    dtype: torch.dtype,
    given: Mapping[str, nn.Module] | None = None,
) -> Any:
    """Load the stock pipeline with the components that the family uses, on the CPU, and check it.

    Args:
        model: Has passed `detect_family`.
        family: What that said.
        dtype: Of the weights. The VAE is kept in float32 (float64 for float64): bf16 latents are
            visibly coarser.
        given: Components that are taken as they are instead of loaded.

    Raises:
        UserError: it cannot be read, is not whole, or holds a value that is no number.
    """
    assert model.path is not None
    given = given or {}
    match source_of(model.path):
        case "mini model":
            pipeline = _build_mini(model, family, torch.promote_types(dtype, torch.float32))
            pipeline.register_modules(**given)
        case "single file":
            pipeline = _load_single_file(model, family, dtype, given)
        case "diffusers folder":
            pipeline = _load_folder(model, Path(model.path), family, dtype, given)
        case "hub id":
            pipeline = _load_folder(model, _download(model, family), family, dtype, given)
    return pipeline


def outline_pipeline(model: ModelConfig, folder: Path | None, family: str) -> Any:
    """Return the pipeline with modules on the meta device: their shapes, and none of their weights.

    A VAE from elsewhere is outlined as the model's own.

    Args:
        model: Has passed `detect_family`.
        folder: Diffusers folder with the model's configuration; None for a mini model.
        family: Of the model.

    Raises:
        UserError: a configuration cannot be read.
    """
    if folder is None:
        pipeline = _build_mini(model.model_copy(update={"vae": None}), family, torch.float32)
        real = _modules(pipeline)
        pipeline.register_modules(
            **{name: _outline(type(module), module.config) for name, module in real.items()}
        )
        return pipeline
    left_out = _left_out(model, family) | _null_components(folder, family)
    used = [name for name in COMPONENTS[family] if name not in left_out]
    check_configs(folder, used)
    index = read_index(folder)
    try:
        modules = {
            name: _outline_component(folder / name, *index[name])
            for name in used
            if not name.startswith(("tokenizer", "scheduler"))
        }
        return _pipeline_class(family).from_pretrained(
            str(folder), **modules, **left_out, **PIPELINE_OPTIONS.get(family, {})
        )
    except LOADING_ERRORS as error:
        raise cannot_load(model, error) from error


def check_files(model: ModelConfig, folder: Path, family: str) -> dict[str, int]:
    """Check that a diffusers folder has all that is used of it, without reading the weights.

    Args:
        model: What is used: its variant, its other VAE, its choice of text encoders.
        folder: Has a readable model_index.json.
        family: Of the model.

    Returns:
        For each component that is loaded from the folder, how many values its files hold.

    Raises:
        UserError: names the file that is missing or not whole.
    """
    left_out = _left_out(model, family) | _null_components(folder, family)
    replaced = set() if model.vae is None else {"vae"}
    used = [name for name in COMPONENTS[family] if name not in {*left_out, *replaced}]
    check_configs(folder, [*used, *replaced])
    return check_folder(folder, used, model.variant)


def _build_mini(model: ModelConfig, family: str, vae_dtype: torch.dtype) -> Any:
    from fastppt.families.vae import load_vae
    from fastppt.mini import build_mini

    assert model.path is not None
    pipeline = build_mini(model.path)
    if not model.large_text_encoder:
        pipeline.register_modules(**dict.fromkeys(LARGE_TEXT_ENCODERS[family]))
    if model.vae is not None:
        pipeline.register_modules(vae=load_vae(model.vae, pipeline.vae.config, vae_dtype))
    return pipeline


def _download(model: ModelConfig, family: str) -> Path:
    """Bring the files of a hub id that are used into the hub's cache; returns their folder."""
    try:
        folder = _pipeline_class(family).download(
            model.path,
            revision=model.revision,
            variant=model.variant,
            use_safetensors=True,
            **_left_out(model, family),
        )
    except LOADING_ERRORS as error:
        raise cannot_load(model, error, HUB_HINT) from error
    return Path(folder)


def _load_folder(
    model: ModelConfig,
    folder: Path,
    family: str,
    dtype: torch.dtype,
    given: Mapping[str, nn.Module],
) -> Any:
    left_out = _left_out(model, family) | _null_components(folder, family)
    num_values = check_files(model, folder, family)
    vae_dtype = torch.promote_types(dtype, torch.float32)
    try:
        vae = _given_vae(model, str(folder), vae_dtype)
        pipeline = _pipeline_class(family).from_pretrained(
            str(folder),
            variant=model.variant,
            dtype={"vae": vae_dtype, "default": dtype},
            use_safetensors=True,
            **left_out,
            **vae,
            **given,
            **PIPELINE_OPTIONS.get(family, {}),
        )
    except UserError:
        raise
    except LOADING_ERRORS as error:
        raise cannot_load(model, error) from error
    check_weights(f"model {model.path}", _modules(pipeline), num_values)
    return pipeline


def _load_single_file(
    model: ModelConfig, family: str, dtype: torch.dtype, given: Mapping[str, nn.Module]
) -> Any:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    assert model.path is not None
    left_out = _left_out(model, family)
    if model.config_folder is not None:
        _null_components(model.config_folder, family)
        used = [name for name in COMPONENTS[family] if name not in left_out]
        check_configs(model.config_folder, used)
    offline = model.config_folder is not None
    vae_dtype = torch.promote_types(dtype, torch.float32)
    try:
        config = str(model.config_folder) if offline else _hub_config(Path(model.path))
        with without_cast_warnings():
            # Apart, for this reader knows of one dtype alone.
            vae = _given_vae(model, config, vae_dtype) or {
                "vae": AutoencoderKL.from_single_file(
                    model.path,
                    config=config,
                    subfolder="vae",
                    dtype=vae_dtype,
                    local_files_only=offline,
                )
            }
            pipeline = _pipeline_class(family).from_single_file(
                model.path,
                config=config,
                dtype=dtype,
                local_files_only=offline,
                **left_out,
                **vae,
                **given,
                **PIPELINE_OPTIONS.get(family, {}),
            )
    except UserError:
        raise
    except (*LOADING_ERRORS, SingleFileComponentError) as error:
        hint = "" if offline else "; without a hub, pass --model-config with its diffusers folder"
        raise cannot_load(model, error, hint) from error
    check_marks(Path(model.path), pipeline.scheduler.config)
    check_weights(f"model {model.path}", _modules(pipeline), {})
    return pipeline


def _outline_component(folder: Path, library: str, class_name: str) -> nn.Module:
    """Return a component of a folder on the meta device."""
    kind = getattr(import_module(library), class_name)
    if library == "diffusers":
        return _outline(kind, kind.load_config(folder))
    return _outline(kind, kind.config_class.from_pretrained(folder))


def _outline(kind: Any, config: Any) -> nn.Module:
    """Return a module of a class of diffusers or transformers on the meta device."""
    # Not moved there: tables that two parts of a text encoder share would become two.
    with torch.device("meta"):
        module = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    assert isinstance(module, nn.Module)
    return module.eval()


def _pipeline_class(family: str) -> Any:
    import diffusers

    # Not DiffusionPipeline: it finds the class by itself, but loads what is passed as None.
    return getattr(diffusers, PIPELINES[family][0])


def _left_out(model: ModelConfig, family: str) -> dict[str, None]:
    """Return the components of the family's pipeline that are not loaded, as diffusers is told."""
    unused = set(_pipeline_class(family)._optional_components) - set(COMPONENTS[family])
    dropped = () if model.large_text_encoder else LARGE_TEXT_ENCODERS[family]
    return dict.fromkeys([*sorted(unused), *dropped])


def _null_components(folder: Path, family: str) -> dict[str, None]:
    """Return the components that a folder was saved without.

    Raises:
        UserError: the family cannot do without one, or one is of another library than `LIBRARIES`.
    """
    index = read_index(folder)
    null = []
    for name in COMPONENTS[family]:
        match index.get(name):
            case None | [None, None]:
                null.append(name)
            case [str() as library, str()] if library in LIBRARIES:
                pass
            case entry:
                raise UserError(
                    f"model {folder}: {INDEX} says of {name} {entry!r}; fastppt reads parts of "
                    f"{' and '.join(LIBRARIES)} alone, for others can bring code of their own"
                )
    for name in null:
        if name not in LARGE_TEXT_ENCODERS.get(family, ()):
            raise UserError(f"model {folder}: {INDEX} names no {name}, which training needs")
    return dict.fromkeys(null)


def _hub_config(file: Path) -> str:
    """Return the hub id of the model whose configuration diffusers takes for a checkpoint."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    shapes = read_shapes(file)
    header = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return str(fetch_diffusers_config(header)["pretrained_model_name_or_path"])


def _given_vae(model: ModelConfig, config: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return ``model.vae`` as a component; nothing if unset.

    Args:
        model: With its VAE.
        config: Diffusers folder or hub id of the model, which says what its own VAE is.
        dtype: Of the VAE.
    """
    if model.vae is None:
        return {}
    from diffusers import AutoencoderKL

    from fastppt.families.vae import load_vae

    return {"vae": load_vae(model.vae, AutoencoderKL.load_config(config, subfolder="vae"), dtype)}


def _modules(pipeline: Any) -> dict[str, nn.Module]:
    parts = pipeline.components.items()
    return {name: part for name, part in parts if isinstance(part, nn.Module)}
