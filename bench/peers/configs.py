"""The configuration files of those trainers that read one."""

import json
import re
from pathlib import Path
from typing import Any

from bench.peers.jobs import PeerJob
from bench.race_plan import SHORT_NAMES, T5_TOKENS
from bench.race_results import RaceSettings
from fastppt.errors import UserError

LEARNING_RATE = 1e-4
# How a run is called, and so the bar of ai-toolkit.
NAME = "race"

ONETRAINER_TYPES = {
    "sd": "STABLE_DIFFUSION_15",
    "sdxl": "STABLE_DIFFUSION_XL_10_BASE",
    "sd3": "STABLE_DIFFUSION_3",
}
ONETRAINER_PRECISION = {"float32": "FLOAT_32", "bfloat16": "BFLOAT_16", "float16": "FLOAT_16"}
# Of the families' pipelines, beside "text_encoder".
MORE_TEXT_ENCODERS = {"sd": (), "sdxl": ("2",), "sd3": ("2", "3")}
# Version of OneTrainer's configuration that the keys here are of: newer ones migrate from it.
ONETRAINER_VERSION = 10
MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
AI_TOOLKIT_FLAGS = {"sd": {}, "sdxl": {"is_xl": True}, "sd3": {"is_v3": True}}


def repeats_of_one_epoch(settings: RaceSettings) -> int:
    """Return how often the photos are there, so that one epoch of whole batches has all steps."""
    return settings.steps * settings.batch_size


def write_accelerate(job: PeerJob) -> Path:
    """Write what `accelerate launch --config_file` reads; returns its path.

    Without one it takes the user's own, which may say many processes, or DeepSpeed.
    """
    config = {
        "distributed_type": "NO",
        "num_processes": 1,
        "num_machines": 1,
        "mixed_precision": MIXED_PRECISION[job.settings.precision],
        "use_cpu": job.device == "cpu",
    }
    return _write(job.output / "accelerate.json", config)


def check_onetrainer(checkout: Path) -> None:
    """Refuse a checkout that would pass over keys, for it does so in silence.

    Raises:
        UserError: its configuration is of an earlier version, or not found.
    """
    path = checkout / "modules" / "util" / "config" / "TrainConfig.py"
    if not path.is_file():
        raise UserError(f"--checkout {checkout}: there is no {path}. Is the path right?")
    found = re.search(r"config_version=(\d+)", path.read_text())
    if found is None or int(found[1]) < ONETRAINER_VERSION:
        raise UserError(
            f"--checkout {checkout}: its configuration is of version "
            f"{found[1] if found else 'unknown'}, and {ONETRAINER_VERSION} or newer is needed; "
            "check out a newer one"
        )


def write_onetrainer(job: PeerJob) -> Path:
    """Write what `scripts/train.py --config-path` reads; returns its path.

    The keys are those of modules/util/config/TrainConfig.py; what the presets "#sdxl 1.0 LoRA" and
    its siblings leave to the interface (fused AdamW) is said too. One epoch has as many samples as
    the race's steps take.
    """
    settings = job.settings
    precision = ONETRAINER_PRECISION[settings.precision]
    prompt = job.output / "prompt.txt"
    prompt.write_text(job.prompts[0])
    still = {"enable_crop_jitter": False, "enable_random_flip": False}
    concept = {
        "name": NAME,
        "path": str(job.photos),
        "seed": settings.seed,
        "balancing": float(settings.steps * settings.batch_size),
        "balancing_strategy": "SAMPLES",
        "image": still,
        "text": {"prompt_source": "concept", "prompt_path": str(prompt)},
        "__version": 1,
    }
    part = {"train": True, "weight_dtype": precision}
    encoders = ["text_encoder", *(f"text_encoder_{n}" for n in MORE_TEXT_ENCODERS[settings.family])]
    config: dict[str, Any] = {
        # Without a version it is taken for the first, of which parts are lost on the way.
        "__version": ONETRAINER_VERSION,
        "training_method": "LORA",
        "model_type": ONETRAINER_TYPES[settings.family],
        "base_model_name": job.model,
        "workspace_dir": str(job.output / "workspace"),
        "cache_dir": str(job.output / "cache"),
        "output_model_destination": str(job.output / "lora.safetensors"),
        "output_model_format": "SAFETENSORS",
        "concepts": [concept],
        "samples": [],
        "sample_after_unit": "NEVER",
        "backup_after_unit": "NEVER",
        "backup_before_save": False,
        "tensorboard": False,
        "aspect_ratio_bucketing": False,
        "gradient_checkpointing": "OFF",
        "resolution": str(settings.resolution),
        "epochs": 1,
        "batch_size": settings.batch_size,
        "learning_rate": LEARNING_RATE,
        "learning_rate_warmup_steps": 0,
        "optimizer": {"optimizer": "ADAMW", "fused": True},
        "timestep_distribution": "LOGIT_NORMAL" if settings.family == "sd3" else "UNIFORM",
        "train_dtype": precision,
        "train_device": job.device,
        "lora_rank": settings.rank,
        "lora_alpha": float(settings.rank),
        "layer_filter": "attn",
        "vae": {"weight_dtype": "FLOAT_32"},
        "transformer" if settings.family == "sd3" else "unet": part,
        **{name: {"train": False, "weight_dtype": precision} for name in encoders},
    }
    return _write(job.output / "onetrainer.json", config)


def write_simpletuner(job: PeerJob) -> Path:
    """Write config/config.json and the data's configuration beside; returns the folder of both.

    The keys are those of its field registry, and of documentation/DREAMBOOTH.md. An unknown one
    ends it.
    """
    settings = job.settings
    folder = job.output / "simpletuner"
    side = {"resolution": settings.resolution, "resolution_type": "pixel_area"}
    data = [
        {
            "id": NAME,
            "type": "local",
            "instance_data_dir": str(job.photos),
            "caption_strategy": "instanceprompt",
            "instance_prompt": job.prompts[0],
            "crop": True,
            "crop_aspect": "square",
            "crop_style": "center",
            "minimum_image_size": 0,
            "metadata_backend": "discovery",
            "cache_dir_vae": str(job.output / "cache" / "vae"),
            "repeats": repeats_of_one_epoch(settings),
            **side,
        },
        {
            "id": "text",
            "type": "local",
            "dataset_type": "text_embeds",
            "default": True,
            "cache_dir": str(job.output / "cache" / "text"),
        },
    ]
    config = {
        "model_type": "lora",
        "model_family": settings.family,
        "pretrained_model_name_or_path": job.model,
        # Of SDXL it takes another one, from a hub, where nobody says which.
        "pretrained_vae_model_name_or_path": job.model,
        "output_dir": str(job.output / "models"),
        "data_backend_config": str(_write(folder / "config" / "data.json", data)),
        "caption_dropout_probability": 0.0,
        "checkpoint_step_interval": settings.steps + 1,
        "disable_bucket_pruning": True,
        "gradient_checkpointing": False,
        "learning_rate": LEARNING_RATE,
        "lora_rank": settings.rank,
        "lora_alpha": settings.rank,
        "lora_dropout": 0.0,
        "lora_type": "standard",
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_train_steps": settings.steps,
        "mixed_precision": "bf16",
        "num_train_epochs": 0,
        "optimizer": "adamw_bf16",
        "push_to_hub": False,
        "report_to": "none",
        # It takes 0 for the time of day.
        "seed": settings.seed + 1,
        "torch_num_threads": settings.threads,
        # Of SD3's T5; the other encoders take 77 anyway.
        "tokenizer_max_length": T5_TOKENS,
        "train_batch_size": settings.batch_size,
        "use_ema": False,
        "validation_disable": True,
        **side,
    }
    _write(folder / "config" / "config.json", config)
    return folder


def write_ai_toolkit(job: PeerJob) -> Path:
    """Write what `run.py` reads: JSON, which is YAML too; returns its path.

    The keys are those of config/examples/train_lora_sd35_large_24gb.yaml and of
    toolkit/config_modules.py, which passes over others in silence.
    """
    settings = job.settings
    process = {
        "type": "sd_trainer",
        "training_folder": str(job.output / "models"),
        "training_seed": settings.seed,
        "device": "cuda:0" if job.device == "cuda" else "cpu",
        "network": {
            "type": "lora",
            "linear": settings.rank,
            "linear_alpha": settings.rank,
            "network_kwargs": {"only_if_contains": ["attn"]},
        },
        "save": {"dtype": "float32", "save_every": settings.steps + 1},
        "datasets": [
            {
                "folder_path": str(job.photos),
                "default_caption": job.prompts[0],
                "caption_ext": "txt",
                "cache_latents_to_disk": True,
                "resolution": [settings.resolution],
                "square_crop": True,
                # Or the last batch of each epoch is smaller.
                "num_repeats": settings.batch_size,
            }
        ],
        "train": {
            "batch_size": settings.batch_size,
            "steps": settings.steps,
            "gradient_accumulation_steps": 1,
            "train_unet": True,
            "train_text_encoder": False,
            "gradient_checkpointing": False,
            "noise_scheduler": "flowmatch" if settings.family == "sd3" else "ddpm",
            "optimizer": "adamw",
            "lr": LEARNING_RATE,
            "skip_first_sample": True,
            "disable_sampling": True,
            "dtype": SHORT_NAMES[settings.precision],
        },
        "model": {"name_or_path": job.model, **AI_TOOLKIT_FLAGS[settings.family]},
    }
    config = {"job": "extension", "config": {"name": NAME, "process": [process]}}
    return _write(job.output / "ai_toolkit.yaml", config)


def _write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))
    return path
