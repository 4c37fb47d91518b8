"""What LoRA files say of themselves: ``ss_*`` as sd-scripts writes, ``modelspec.*`` as specified.

Source: the keys of sd-scripts' ``train_network.py`` and ``networks/lora.py``; Stability AI's
ModelSpec 1.0.0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.data.class_images import class_images_in_words
from fastppt.data.prompts import subject_words
from fastppt.families.base import Family
from fastppt.families.lora_keys import has_kohya_form, is_second_version
from fastppt.stage_config import StageConfig

PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# ModelSpec has words for these alone: a flow model says nothing.
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
# The part of a file that A1111's first LoRA extension hashed, in bytes.
LEGACY_START, LEGACY_LENGTH = 0x100000, 0x10000
# Where a file names the learned word that its prompts want; no other program has a place for it.
WORD_KEY = "fastppt.word"
# What else a file of ours says: what was trained, and from which model.
TRAINABLE_KEY = "fastppt.trainable"
BASE_KEY = "fastppt.base_model"


def run_metadata(
    config: RunConfig,
    family: Family,
    rank: int,
    alpha: float,
    name: str,
    photo_counts: Mapping[tuple[int, int], int],
) -> dict[str, str]:
    """Return what model managers show of a run's LoRA; `with_hashes` adds the hashes.

    Args:
        config: The run's, resolved.
        family: Whose network was trained.
        rank: Of the adapters.
        alpha: As it is in the file.
        name: Of the file.
        photo_counts: Number of photos that were trained at each (height, width), pixels.
    """
    subject = subject_words(config.prompts)
    return (
        {"ss_output_name": name}
        | _training_facts(config, family, rank, alpha)
        | _data_facts(config, photo_counts)
        | model_spec(config, family, name, kind="/lora", trigger=subject)
        | word_entry(config)
    )


def learned_word(config: RunConfig) -> str | None:
    """Return the word whose embeddings a run trains; None where it trains none."""
    return config.prompts.token if "tokens" in config.trainables else None


def word_entry(config: RunConfig) -> dict[str, str]:
    """Return the entry that names the learned word; none where a run trains none."""
    word = learned_word(config)
    return {} if word is None else {WORD_KEY: word}


def objectives_in_words(config: RunConfig) -> str:
    """Return each stage's objectives and weights: `denoising 1 (uniform), anchor 0.001 (raw)`."""
    return "; then ".join(_stage_in_words(stage) for stage in config.stage)


def _stage_in_words(stage: StageConfig) -> str:
    kinds = {"denoising": "weighting", "anchor": "form"}
    words = [
        f"{name} {objective.weight:g}"
        + (f" ({getattr(objective, kinds[name])})" if name in kinds else "")
        for name, objective in stage.objectives
        if objective is not None
    ]
    if stage.objectives.prior_preservation is not None:
        images = class_images_in_words(stage.objectives.prior_preservation)
        words.append(f"class images: {images}")
    if stage.base_every > 1:
        words.append(f"base asked every {stage.base_every} steps")
    if stage.ema_decay > 0:
        words.append(f"moving average of decay {stage.ema_decay:g}")
    return ", ".join(words)


def _training_facts(config: RunConfig, family: Family, rank: int, alpha: float) -> dict[str, str]:
    """Return how the adapters were trained, in sd-scripts' words; None is what it writes, too."""
    stage = config.stage[-1]
    steps = sum(stage.steps for stage in config.stage)
    # Of each trainable the last stage's.
    tables = {n: table for each in config.stage for n, table in each.trainables.given.items()}
    rates = {name: f"{table.learning_rate:g}" for name, table in tables.items()}
    network_rate = rates.get(config.network or "", "None")
    text_rate = rates.get("text_encoder_lora", "None")
    denoising = stage.objectives.denoising
    snr_gamma = None
    if denoising is not None and denoising.weighting == "min_snr":
        snr_gamma = denoising.snr_gamma
    model = Path(str(config.model.path))
    facts = {
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_dropout": "None",
        "ss_base_model_version": family.kohya_model_version,
        # As sd-scripts: of a file or folder its name alone.
        "ss_sd_model_name": model.resolve().name if model.exists() else str(model),
        "ss_v2": str(is_second_version(family.kohya_model_version)),
        "ss_clip_skip": "None",
        "ss_max_token_length": "None",
        "ss_training_finished_at": f"{datetime.now(UTC).timestamp():.0f}",
        "ss_steps": str(steps),
        "ss_max_train_steps": str(steps),
        "ss_gradient_accumulation_steps": str(stage.gradient_accumulation),
        "ss_gradient_checkpointing": str(config.gradient_checkpointing),
        "ss_learning_rate": text_rate if config.network is None else network_rate,
        "ss_unet_lr": network_rate,
        "ss_text_encoder_lr": text_rate,
        "ss_lr_scheduler": stage.schedule,
        "ss_lr_warmup_steps": str(stage.warmup_steps),
        "ss_optimizer": "fastppt_kernels.AnchoredAdamW",
        "ss_max_grad_norm": f"{stage.optimizer.max_grad_norm:g}",
        "ss_mixed_precision": PRECISIONS.get(family.dtype, "no"),
        "ss_full_fp16": "False",
        "ss_cache_latents": "True",
        "ss_noise_offset": "None",
        "ss_min_snr_gamma": "None" if snr_gamma is None else f"{snr_gamma:g}",
        "ss_seed": str(config.seed),
        "ss_training_comment": f"fastppt, {config.method}: {objectives_in_words(config)}",
    }
    if config.model.vae is not None:
        facts["ss_vae_name"] = Path(config.model.vae).name
    if has_kohya_form(family.name):
        facts["ss_network_module"] = "networks.lora"
    return facts


def _data_facts(config: RunConfig, photo_counts: Mapping[tuple[int, int], int]) -> dict[str, str]:
    """Return what was trained on, in sd-scripts' words."""
    num_photos = sum(photo_counts.values())
    buckets = {
        str(index): {"resolution": [width, height], "count": count}
        for index, ((height, width), count) in enumerate(photo_counts.items())
    }
    stage = config.stage[-1]
    side = config.photos.resolution
    subject = subject_words(config.prompts)
    prior = stage.objectives.prior_preservation
    assert config.photos.folder is not None
    folder = config.photos.folder.resolve().name
    return {
        "ss_num_train_images": str(num_photos),
        "ss_num_reg_images": "0" if prior is None else str(prior.num_images),
        "ss_dataset_dirs": json.dumps({folder: {"n_repeats": 1, "img_count": num_photos}}),
        "ss_reg_dataset_dirs": "{}",
        "ss_tag_frequency": json.dumps({subject: {subject: num_photos}}),
        "ss_resolution": f"({side}, {side})",
        "ss_enable_bucket": str(config.photos.buckets),
        "ss_bucket_info": json.dumps({"buckets": buckets} if config.photos.buckets else None),
        "ss_batch_size_per_device": str(stage.batch_size),
        "ss_total_batch_size": str(stage.batch_size * stage.gradient_accumulation),
        "ss_color_aug": "False",
        "ss_flip_aug": "False",
        "ss_random_crop": "False",
        "ss_shuffle_caption": "False",
        "ss_keep_tokens": "0",
    } | ({} if prior is None else {"ss_prior_loss_weight": f"{prior.weight:g}"})


def model_spec(
    config: RunConfig, family: Family, name: str, *, kind: str, trigger: str
) -> dict[str, str]:
    """Return the ModelSpec entries of a file of a run; the hash is `with_hashes`' to fill in.

    Args:
        config: The run's, resolved.
        family: Whose model was trained.
        name: Of the file.
        kind: What the file is to the model: `/lora` or `/textual-inversion`; empty for a model.
        trigger: The words that show the subject.
    """
    side = config.photos.resolution
    spec = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{family.modelspec_architecture}{kind}",
        "implementation": "diffusers",
        "title": name,
        "description": f"{subject_words(config.prompts)}, learned by fastppt ({config.method})",
        "trigger_phrase": trigger,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "resolution": f"{side}x{side}",
        "hash_sha256": "",
    }
    if family.prediction_type in PREDICTIONS:
        spec["prediction_type"] = PREDICTIONS[family.prediction_type]
    return {f"modelspec.{key}": value for key, value in spec.items()}


def file_content(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a .safetensors file with these tensors (contiguous), its hashes computed anew.

    The same input gives the same bytes: safetensors itself writes the metadata in any order.
    """
    content: bytes = save(dict(tensors), metadata=with_hashes(tensors, metadata))
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # Tensors begin at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[start:]


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata with the hashes of these tensors in the places of its own.

    ``modelspec.hash_sha256`` and ``sshs_model_hash``: SHA-256 of the file behind its header.
    ``sshs_legacy_hash``: the first eight digits of that of 64 KiB from the first MiB on, in a file
    with the ``ss_*`` entries alone. The two ``sshs_*`` are given wherever there are ``ss_*`` ones.

    Source: ModelSpec 1.0.0; ``precalculate_safetensors_hashes`` of sd-scripts' ``train_util.py``.
    """
    stamped = dict(metadata)
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    if not training and "modelspec.hash_sha256" not in metadata:
        return stamped
    content = save(dict(tensors), metadata=training or None)
    header_length = int.from_bytes(content[:8], "little")
    digest = hashlib.sha256(content[8 + header_length :]).hexdigest()
    if "modelspec.hash_sha256" in metadata:
        stamped["modelspec.hash_sha256"] = f"0x{digest}"
    if training:
        legacy = content[LEGACY_START : LEGACY_START + LEGACY_LENGTH]
        stamped["sshs_model_hash"] = digest
        stamped["sshs_legacy_hash"] = hashlib.sha256(legacy).hexdigest()[:8]
    return stamped
