"""The flags that several commands have, and the keys of a configuration that they set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastppt.config import RunConfig
from fastppt.config_io import parse_setting
from fastppt.errors import UserError

Config = Annotated[
    Path | None, typer.Argument(metavar="[RUN.TOML]", help="A run's TOML file; flags win over it.")
]
Recipe = Annotated[str | None, typer.Option(help="Method; see `fastppt recipes`.")]
Model = Annotated[
    str | None,
    typer.Option(
        help="Hub id (owner/name), diffusers folder, .safetensors checkpoint, or a mini model "
        "(`fastppt doctor` lists them)."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Variant = Annotated[str | None, typer.Option(help="Variant of the weight files, such as fp16.")]
ModelFolder = Annotated[
    Path | None,
    typer.Option("--model-config", help="Diffusers folder that configures a single checkpoint."),
]
Vae = Annotated[str | None, typer.Option(help="Another VAE: hub id, folder or .safetensors file.")]
Attention = Annotated[str | None, typer.Option(help="sdpa, xformers or flash.")]
Buckets = Annotated[
    bool | None,
    typer.Option("--buckets/--no-buckets", help="Crop to a few aspect ratios, or to squares."),
]
SaveDtype = Annotated[str | None, typer.Option(help="LoRA files in fp32, bf16 or fp16.")]
Photos = Annotated[Path | None, typer.Option(help="Folder with the photos of the subject.")]
Captions = Annotated[
    Path | None, typer.Option(help="TOML file of captions by photo, or folder of .txt files.")
]
ClassNoun = Annotated[str | None, typer.Option(help="Everyday noun of the subject, such as dog.")]
Token = Annotated[str | None, typer.Option(help="Rare word that comes to stand for the subject.")]
Output = Annotated[Path | None, typer.Option(help="Folder for everything the run writes.")]
Name = Annotated[str | None, typer.Option(help="Name of the LoRA file.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps (of a run with one stage).")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same run.")]
Resolution = Annotated[int | None, typer.Option(help="Side of the training square in pixels.")]
BatchSize = Annotated[int | None, typer.Option(help="Photos a pass.")]
Rank = Annotated[int | None, typer.Option(help="Rank of the adapters.")]
LearningRate = Annotated[float | None, typer.Option(help="Learning rate of the adapters.")]
AnchorWeight = Annotated[float | None, typer.Option(help="Weight of the anchor.")]
InitLora = Annotated[Path | None, typer.Option(help="LoRA file or run folder to start from.")]
EngineName = Annotated[
    str | None, typer.Option("--engine", help="auto, eager, compile, graph or graph+compile.")
]
GradientCheckpointing = Annotated[
    bool | None,
    typer.Option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        help="Less memory, longer steps; or the other way round.",
    ),
]
Deterministic = Annotated[
    bool | None,
    typer.Option("--deterministic/--no-deterministic", help="Bit for bit on a GPU too; slower."),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[str | None, typer.Option(help="auto, bf16, fp16 or fp32.")]
LogEvery = Annotated[int | None, typer.Option(help="Steps between two looks at the metrics.")]
SampleEvery = Annotated[int | None, typer.Option(help="Steps between two sample grids.")]
CheckpointEvery = Annotated[int | None, typer.Option(help="Steps between two checkpoints.")]
KeepCheckpoints = Annotated[int | None, typer.Option(help="Checkpoints to keep; 0 keeps all.")]
Samples = Annotated[
    bool | None, typer.Option("--samples/--no-samples", help="Draw sample grids, or none.")
]
Tensorboard = Annotated[
    bool | None, typer.Option("--tensorboard/--no-tensorboard", help="Write TensorBoard curves.")
]
Plots = Annotated[
    bool | None, typer.Option("--plots/--no-plots", help="Draw the metrics into OUTPUT/plots.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any key, such as stage.0.steps=200."),
]

# Flag, and the key that it sets.
FLAG_KEYS = {
    "model": "model.path",
    "revision": "model.revision",
    "variant": "model.variant",
    "model_config": "model.config_folder",
    "vae": "model.vae",
    "attention": "model.attention",
    "buckets": "photos.buckets",
    "save_dtype": "save_dtype",
    "photos": "photos.folder",
    "captions": "photos.captions",
    "class_noun": "prompts.class_noun",
    "token": "prompts.token",
    "output": "output",
    "name": "name",
    "steps": "stage.0.steps",
    "seed": "seed",
    "resolution": "photos.resolution",
    "batch_size": "stage.0.batch_size",
    "rank": "stage.0.trainables.lora.rank",
    "learning_rate": "stage.0.trainables.lora.learning_rate",
    "anchor_weight": "stage.0.objectives.anchor.weight",
    "init_lora": "stage.0.trainables.lora.init",
    "engine": "engine",
    "gradient_checkpointing": "gradient_checkpointing",
    "deterministic": "deterministic",
    "device": "model.device",
    "precision": "model.precision",
    "log_every": "log_every",
    "sample_every": "sample_every",
    "checkpoint_every": "checkpoint_every",
    "keep_checkpoints": "keep_checkpoints",
    "samples": "samples.enabled",
    "tensorboard": "tensorboard",
    "plots": "plots",
}


def flag_settings(given: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return key and value of each flag that was given; paths become text, as in a TOML file."""
    return [
        (key, str(given[flag]) if isinstance(given[flag], Path) else given[flag])
        for flag, key in FLAG_KEYS.items()
        if given.get(flag) is not None
    ]


def set_settings(settings: list[str] | None) -> list[tuple[str, Any]]:
    """Return key and value of each ``--set``."""
    return [parse_setting(text) for text in settings or []]


def model_settings(given: dict[str, Any], settings: list[str] | None) -> dict[str, Any]:
    """Return the keys of the model table that the flags and ``--set`` of `generate` give."""
    table = "model."
    chosen = set_settings(settings)
    for key, _ in chosen:
        if not key.startswith(table):
            raise UserError(f"--set {key}: of all keys `generate` takes those of {table}* alone")
    flags = [(key, value) for key, value in flag_settings(given) if key.startswith(table)]
    return {key.removeprefix(table): value for key, value in [*flags, *chosen]}


def check_resume_flags(run: Path | None, recipe: str | None, overwrite: bool) -> None:
    """Refuse what says from the start what a run is."""
    if overwrite:
        raise UserError("--resume goes on with a run and --overwrite deletes it; give one of them")
    for name, value in ((str(run), run), ("--recipe", recipe)):
        if value is not None:
            raise UserError(
                f"{name}: a resumed run has its own configuration; leave it out, and change keys "
                "with flags or --set"
            )


def check_stage_flags(config: RunConfig, given: dict[str, Any]) -> None:
    """Refuse flags that do not say which of several stages they mean."""
    for flag, key in FLAG_KEYS.items():
        if len(config.stage) > 1 and given[flag] is not None and key.startswith("stage.0."):
            raise UserError(
                f"--{flag.replace('_', '-')}: this run has {len(config.stage)} stages; "
                f"say which one with --set {key.replace('.0.', '.N.')}=..."
            )
