"""The command line: one function a command. Each imports the heavy libraries that it uses."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastppt import __version__
from fastppt.config import RunConfig
from fastppt.config_io import RECIPES, build_config, load_recipe, parse_setting, render_toml
from fastppt.errors import UserError
from fastppt.machine import peak_host_memory, size_in_words

if TYPE_CHECKING:
    from fastppt.training.run import RunResult

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Teach a text-to-image model one subject without letting it forget the rest.",
)

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
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[str | None, typer.Option(help="auto, bf16, fp16 or fp32.")]
LogEvery = Annotated[int | None, typer.Option(help="Steps between two looks at the metrics.")]
SampleEvery = Annotated[int | None, typer.Option(help="Steps between two sample grids.")]
CheckpointEvery = Annotated[int | None, typer.Option(help="Steps between two checkpoints.")]
Samples = Annotated[
    bool | None, typer.Option("--samples/--no-samples", help="Draw sample grids, or none.")
]
Tensorboard = Annotated[
    bool | None, typer.Option("--tensorboard/--no-tensorboard", help="Write TensorBoard curves.")
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
    "device": "model.device",
    "precision": "model.precision",
    "log_every": "log_every",
    "sample_every": "sample_every",
    "checkpoint_every": "checkpoint_every",
    "samples": "samples.enabled",
    "tensorboard": "tensorboard",
}


def main() -> None:
    """Run the command line; a mistake of the user's is one message and exit code 2."""
    # transformers announces at import which of its image processors it cannot use; none is used.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()


@app.command()
def train(
    run: Config = None,
    recipe: Recipe = None,
    model: Model = None,
    revision: Revision = None,
    variant: Variant = None,
    model_config: ModelFolder = None,
    vae: Vae = None,
    attention: Attention = None,
    photos: Photos = None,
    buckets: Buckets = None,
    class_noun: ClassNoun = None,
    token: Token = None,
    output: Output = None,
    name: Name = None,
    steps: Steps = None,
    seed: Seed = None,
    resolution: Resolution = None,
    batch_size: BatchSize = None,
    rank: Rank = None,
    learning_rate: LearningRate = None,
    anchor_weight: AnchorWeight = None,
    init_lora: InitLora = None,
    engine: EngineName = None,
    gradient_checkpointing: GradientCheckpointing = None,
    device: Device = None,
    precision: Precision = None,
    log_every: LogEvery = None,
    sample_every: SampleEvery = None,
    checkpoint_every: CheckpointEvery = None,
    samples: Samples = None,
    save_dtype: SaveDtype = None,
    tensorboard: Tensorboard = None,
    settings: Settings = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run that the output folder holds.")
    ] = False,
) -> None:
    """Teach a model one subject from a folder of photos."""
    given = locals()
    console = Console()
    with user_errors():
        config = build_config(recipe, run, [*_flag_settings(given), *_set_settings(settings)])
        _check_stage_flags(config, given)
        from fastppt.training.loop import train as train_run

        result = train_run(config, console, overwrite=overwrite)
    _print_result(result, console)


@app.command()
def generate(
    lora: Annotated[Path, typer.Option(help="Folder of a finished run, or a LoRA file.")],
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    count: Annotated[int, typer.Option(min=1, help="Number of pictures.")] = 1,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**62, help="Of the first picture; the next count on."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampler steps.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0.0, help="Classifier-free guidance scale.")
    ] = None,
    resolution: Annotated[int | None, typer.Option(min=8, help="Side in pixels.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the pictures (default: LORA/generated).")
    ] = None,
    model: Model = None,
    revision: Revision = None,
    variant: Variant = None,
    model_config: ModelFolder = None,
    vae: Vae = None,
    attention: Attention = None,
    device: Device = None,
    precision: Precision = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any key of the table `model`."),
    ] = None,
) -> None:
    """Draw pictures with a trained LoRA."""
    given = locals()
    with user_errors():
        model_settings = _model_settings(given, settings)
        from fastppt.outputs.generate import generate as generate_pictures

        paths = generate_pictures(
            lora,
            prompt,
            count=count,
            seed=seed,
            steps=steps,
            guidance_scale=guidance_scale,
            resolution=resolution,
            output=output,
            model=model_settings,
        )
    for path in paths:
        print(path)


@app.command()
def convert(
    file: Annotated[
        Path,
        typer.Argument(help="LoRA file, folder of a finished run, or a folder that peft saved."),
    ],
    to: Annotated[str, typer.Option("--to", metavar="FORM", help="kohya, diffusers or peft.")],
    output: Annotated[
        Path | None, typer.Option(help="File, or folder for peft (default: beside FILE).")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16 (default: as in FILE).")
    ] = None,
) -> None:
    """Write a LoRA in another form, bit for bit."""
    with user_errors():
        from fastppt.outputs.convert import convert as convert_lora

        print(convert_lora(file, to, output, dtype))


@app.command()
def info(
    file: Annotated[
        Path,
        typer.Argument(help="LoRA file, folder of a finished run, or a folder that peft saved."),
    ],
) -> None:
    """Print what a LoRA is: family, rank, alpha, targets, what it adds where, metadata."""
    with user_errors():
        from fastppt.outputs.info import print_info, read_info

        print_info(read_info(file), Console())


@app.command()
def doctor(
    run: Config = None,
    model: Model = None,
    revision: Revision = None,
    variant: Variant = None,
    model_config: ModelFolder = None,
    vae: Vae = None,
    attention: Attention = None,
    output: Output = None,
    engine: EngineName = None,
    gradient_checkpointing: GradientCheckpointing = None,
    device: Device = None,
    precision: Precision = None,
    settings: Settings = None,
) -> None:
    """Say what is here, and whether a training (of --model) could start; exits with 1 if not."""
    given = locals()
    with user_errors():
        config = build_config(None, run, [*_flag_settings(given), *_set_settings(settings)])
    from fastppt.doctor import can_train, examine, print_report

    report = examine(config)
    print_report(report, Console(highlight=False))
    if not can_train(report):
        raise typer.Exit(code=1)


@app.command()
def recipes() -> None:
    """List the recipes: one published method each."""
    table = Table("recipe", "families", "what it is")
    for name in RECIPES:
        recipe, _ = load_recipe(name)
        table.add_row(name, ", ".join(recipe.families), recipe.summary)
    Console().print(table)


@app.command()
def config(run: Config = None, recipe: Recipe = None, settings: Settings = None) -> None:
    """Print a whole run as commented TOML, which `fastppt train` takes back."""
    with user_errors():
        print(render_toml(build_config(recipe, run, _set_settings(settings))), end="")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fastppt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


@contextmanager
def user_errors() -> Iterator[None]:
    """Print a `UserError` as one message on standard error and exit with code 2."""
    try:
        yield
    except UserError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"[red]error:[/red] {escape(str(error))}"
        )
        raise typer.Exit(code=2) from None


def _flag_settings(given: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return key and value of each flag that was given; paths become text, as in a TOML file."""
    return [
        (key, str(given[flag]) if isinstance(given[flag], Path) else given[flag])
        for flag, key in FLAG_KEYS.items()
        if given.get(flag) is not None
    ]


def _set_settings(settings: list[str] | None) -> list[tuple[str, Any]]:
    return [parse_setting(text) for text in settings or []]


def _model_settings(given: dict[str, Any], settings: list[str] | None) -> dict[str, Any]:
    """Return the keys of the model table that the flags and ``--set`` of `generate` give."""
    table = "model."
    chosen = _set_settings(settings)
    for key, _ in chosen:
        if not key.startswith(table):
            raise UserError(f"--set {key}: of all keys `generate` takes those of {table}* alone")
    flags = [(key, value) for key, value in _flag_settings(given) if key.startswith(table)]
    return {key.removeprefix(table): value for key, value in [*flags, *chosen]}


def _check_stage_flags(config: RunConfig, given: dict[str, Any]) -> None:
    for flag, key in FLAG_KEYS.items():
        if len(config.stage) > 1 and given[flag] is not None and key.startswith("stage.0."):
            raise UserError(
                f"--{flag.replace('_', '-')}: this run has {len(config.stage)} stages; "
                f"say which one with --set {key.replace('.0.', '.N.')}=..."
            )


def _program() -> str:
    """Return what a user types to start this program from the same place."""
    if shutil.which("fastppt"):
        return "fastppt"
    script = Path(sys.argv[0])
    return "python -m fastppt" if script.name == "__main__.py" else str(script)


def _peaks_in_words(result: RunResult) -> str:
    """Return the most memory that the run has had: of the GPU by phase, of the host in all."""
    host = f"host {size_in_words(peak_host_memory())} (the whole process)"
    if not result.peak_memory:
        return host
    phases = (f"{phase} {size_in_words(peak)}" for phase, peak in result.peak_memory.items())
    most = size_in_words(max(result.peak_memory.values()))
    return f"GPU {most} ({', '.join(phases)}), {host}"


def _print_result(result: RunResult, console: Console) -> None:
    seconds = ", ".join(f"{name} {spent:.1f} s" for name, spent in result.seconds.items())
    console.print(f"time: {seconds}", highlight=False)
    console.print(f"peak memory: {_peaks_in_words(result)}", highlight=False)
    console.print("wrote:", highlight=False)
    for path in result.files:
        console.print(f"  {path}", highlight=False, soft_wrap=True, markup=False)
    root = shlex.quote(str(result.folder.root))
    prompt = shlex.quote(result.trigger_prompt)
    command = f"{_program()} generate --lora {root} --prompt {prompt} --count 4"
    console.print("use it:", highlight=False)
    console.print(f"  {command}", highlight=False, soft_wrap=True, markup=False)
