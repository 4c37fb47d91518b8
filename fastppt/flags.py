"""The flags that several commands have, and the keys of a configuration that they set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fastppt.config_io import Table, parse_setting
from fastppt.config_types import section_type
from fastppt.errors import UserError
from fastppt.trainables_config import NETWORK_TRAINABLES, TrainablesConfig

# The tables of what can be trained, by name.
TRAINABLES = {
    name: table
    for name, field in TrainablesConfig.model_fields.items()
    if (table := section_type(field.annotation)) is not None
}

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
Name = Annotated[str | None, typer.Option(help="Name of the LoRA file, or of the checkpoint.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps (of a run with one stage).")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same run.")]
Resolution = Annotated[int | None, typer.Option(help="Side of the training square in pixels.")]
BatchSize = Annotated[int | None, typer.Option(help="Photos a pass.")]
Rank = Annotated[int | None, typer.Option(help="Rank of the adapters.")]
LearningRate = Annotated[
    float | None,
    typer.Option(
        help="Learning rate of what moves in the network, or of the only thing that moves."
    ),
]
AnchorWeight = Annotated[float | None, typer.Option(help="Weight of the anchor.")]
ClassImages = Annotated[
    Path | None,
    typer.Option(help="Folder with pictures of the class, for prior preservation."),
]
NumClassImages = Annotated[
    int | None, typer.Option(help="Pictures of the class: of that folder, or drawn.")
]
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

# Flags of a stage, and the key that each sets: of the stage, or of something that it trains.
STAGE_KEYS = {
    "steps": "steps",
    "batch_size": "batch_size",
    "anchor_weight": "objectives.anchor.weight",
    "class_images": "objectives.prior_preservation.folder",
    "num_class_images": "objectives.prior_preservation.num_images",
}
TRAINABLE_KEYS = {"rank": "rank", "learning_rate": "learning_rate"}

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
    "seed": "seed",
    "resolution": "photos.resolution",
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
        (key, _as_in_toml(given[flag]))
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


def stage_settings(given: dict[str, Any], stages: Sequence[Table]) -> list[tuple[str, Any]]:
    """Return key and value of each flag that was given and is about a stage.

    `--rank` and `--learning-rate` are for what moves in the network in a run of one stage, or else
    for the only thing that has such a key; `--init-lora` for the first stage that trains a LoRA;
    the others for the one stage.

    Args:
        given: Flags and their values.
        stages: Of the run, as `stage_tables` returns them. What is wrong in them is for
            `build_config` to say.

    Raises:
        UserError: a flag does not say which of several places it means, or there is none for it.
    """
    moving = [(index, name) for index, stage in enumerate(stages) for name in _trainables_of(stage)]
    settings = []
    for flag, key in STAGE_KEYS.items():
        if given.get(flag) is not None and stages:
            if len(stages) > 1:
                raise _unclear(flag, f"this run has {len(stages)} stages", [f"stage.N.{key}"])
            settings.append((f"stage.0.{key}", _as_in_toml(given[flag])))
    for flag, key in TRAINABLE_KEYS.items():
        if given.get(flag) is not None and moving:
            settings.append((_trainable_key(flag, key, moving, len(stages)), given[flag]))
    if given.get("init_lora") is not None and moving:
        index = next((index for index, name in moving if name == "lora"), None)
        if index is None:
            raise UserError(f"--init-lora: this run trains no LoRA, but {_in_words(moving)}")
        settings.append((f"stage.{index}.trainables.lora.init", str(given["init_lora"])))
    return settings


def _as_in_toml(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _trainable_key(flag: str, key: str, moving: Sequence[tuple[int, str]], num_stages: int) -> str:
    """Return the key of the one trainable that a flag can mean."""
    having = [(index, name) for index, name in moving if key in TRAINABLES[name].model_fields]
    in_network = [place for place in moving if place[1] in NETWORK_TRAINABLES]
    if num_stages == 1 and in_network:
        chosen = [place for place in in_network if place in having]
    else:
        chosen = having
    if len(chosen) == 1:
        ((index, name),) = chosen
        return f"stage.{index}.trainables.{name}.{key}"
    keys = [f"stage.{index}.trainables.{name}.{key}" for index, name in having]
    if keys:
        raise _unclear(flag, f"this run trains {_in_words(moving)}", keys)
    raise UserError(
        f"--{flag.replace('_', '-')}: this run trains {_in_words(moving)}, without a {key}; leave "
        "it out"
    )


def _trainables_of(stage: Table) -> list[str]:
    """Return the names of what a stage trains."""
    tables = stage.get("trainables")
    return [name for name in TRAINABLES if isinstance(tables, dict) and name in tables]


def _unclear(flag: str, reason: str, keys: Sequence[str]) -> UserError:
    """Return what refuses a flag that could mean several keys."""
    ways = " or ".join(f"--set {key}=..." for key in keys)
    return UserError(f"--{flag.replace('_', '-')}: {reason}; say which one with {ways}")


def _in_words(moving: Sequence[tuple[int, str]]) -> str:
    return " and ".join(dict.fromkeys(name for _, name in moving))
