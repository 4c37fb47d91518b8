"""The configuration files of those trainers that read one."""

import json
from pathlib import Path
from typing import Any

from bench.peers.jobs import PeerJob
from bench.race_plan import SHORT_NAMES

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
AI_TOOLKIT_FLAGS = {"sd": {}, "sdxl": {"is_xl": True}, "sd3": {"is_v3": True}}


def write_onetrainer(job: PeerJob) -> Path:
    """Write what `scripts/train.py --config-path` reads; returns its path.

    The keys are those of the presets "#sdxl 1.0 LoRA" and its siblings, in the form that every
    version migrates from. One epoch has as many samples as the race's steps take.
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
        "gradient_checkpointing": False,
        "resolution": str(settings.resolution),
        "epochs": 1,
        "batch_size": settings.batch_size,
        "learning_rate": LEARNING_RATE,
        "learning_rate_warmup_steps": 0,
        "weight_dtype": precision,
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

    The keys are those of simpletuner/examples and of documentation/DREAMBOOTH.md.
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
            "repeats": settings.batch_size,
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
        "output_dir": str(job.output / "models"),
        "data_backend_config": str(_write(folder / "config" / "data.json", data)),
        "caption_dropout_probability": 0.0,
        "checkpoint_step_interval": settings.steps + 1,
        "disable_bucket_pruning": True,
        "gradient_checkpointing": False,
        "learning_rate": LEARNING_RATE,
        "lora_rank": settings.rank,
        "lora_alpha": settings.rank,
        "lora_type": "standard",
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_train_steps": settings.steps,
        "mixed_precision": "bf16",
        "num_train_epochs": 0,
        "optimizer": "adamw_bf16",
        "push_to_hub": False,
        "report_to": "none",
        "seed": settings.seed,
        "train_batch_size": settings.batch_size,
        "use_ema": False,
        "validation_disable": True,
        **side,
    }
    _write(folder / "config" / "config.json", config)
    return folder


def write_ai_toolkit(job: PeerJob) -> Path:
    """Write what `run.py` reads: JSON, which is YAML too; returns its path.

    The keys are those of config/examples/train_lora_sd35_large_24gb.yaml.
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
