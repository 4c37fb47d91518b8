"""How each trainer is told to do a race's job: its documented command, and what is changed of it.

Changed is what a race fixes for all: model, photos, prompts, resolution, batch, rank, precision,
steps and seed; torch's AdamW at a constant rate; no pictures and no checkpoints on the way. What
the documentation turns on to save memory at the price of time (gradient checkpointing, gradients of
several passes) is off. Flags and keys are those of the sources that bench/peers/README.md names.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w

from bench.peers.configs import (
    LEARNING_RATE,
    MIXED_PRECISION,
    NAME,
    check_onetrainer,
    repeats_of_one_epoch,
    write_accelerate,
    write_ai_toolkit,
    write_onetrainer,
    write_simpletuner,
)
from bench.peers.jobs import PeerJob
from bench.peers.run import Command
from bench.race_plan import T5_TOKENS
from bench.race_results import RaceSettings
from fastppt.errors import UserError
from fastppt.families.names import MINI_MODELS

# Sampler steps and guidance of diffusers' pipelines where nobody says other: their scripts sample
# class images so, and have no flag for either.
PIPELINE_SAMPLING = {"sd": (50, 7.5), "sdxl": (50, 5.0), "sd3": (28, 7.0)}
ALL_PRECISIONS = tuple(MIXED_PRECISION)

DIFFUSERS_SCRIPTS = {
    "sd": "train_dreambooth_lora.py",
    "sdxl": "train_dreambooth_lora_sdxl.py",
    "sd3": "train_dreambooth_lora_sd3.py",
}
KOHYA_SCRIPTS = {
    "sd": "train_network.py",
    "sdxl": "sdxl_train_network.py",
    "sd3": "sd3_train_network.py",
}


@dataclass(frozen=True)
class Trainer:
    """One of the trainers.

    Attributes:
        families: That it trains by these commands.
        precisions: Of the network, likewise.
        command: Returns how it is run; writes the files that it is told to read.
        bar: Pattern of the name of the progress bar of its steps.
        result: The LoRA that it leaves, in the folder of the round.
        note: What a reader has to know to compare it.
        class_bar: That of the class images, which it samples itself; None: it does not.
        loads: The forms of a model that it reads: "folder" (diffusers), "file".
        loads_of: Likewise of a family, where it reads others.
        devices: That it trains on.
        no_mini: Why it cannot train the embedded models; None: it may.
        reads_sd2: Its command is that of Stable Diffusion 2.x too, not of 1.x alone.
        has_help: Its command with --help imports what a run imports, and no more.
        begins: Pattern of what it prints when it has imported all; better than --help.
        counts_from: The count that its bar shows when the first step is done.
        complaint: Pattern of a line that says that it left out a setting; such a run is refused.
    """

    families: tuple[str, ...]
    precisions: tuple[str, ...]
    command: Callable[[PeerJob], Command]
    bar: str
    result: str
    note: str
    class_bar: str | None = None
    loads: tuple[str, ...] = ("folder", "file")
    loads_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cuda", "cpu")
    no_mini: str | None = None
    reads_sd2: bool = False
    has_help: bool = False
    begins: str | None = None
    counts_from: int = 1
    complaint: str | None = None

    def check(self, name: str, settings: RaceSettings, device: str, *, prior: bool) -> None:
        """Refuse what the trainer cannot be told, before it is run for minutes.

        Raises:
            UserError: names the flag.
        """
        if settings.family not in self.families:
            raise UserError(
                f"--trainer {name}: is run on {', '.join(self.families)}, and the model is "
                f"{settings.family}"
            )
        if settings.precision not in self.precisions:
            raise UserError(
                f"--trainer {name}: trains in {', '.join(self.precisions)}, "
                f"not in {settings.precision}"
            )
        if device not in self.devices:
            raise UserError(f"--device {device}: {name} trains on {', '.join(self.devices)} alone")
        if prior and self.class_bar is None:
            raise UserError(
                f"--prior: {name} samples no class images itself; only diffusers' scripts do"
            )
        sampling = settings.sampler_steps, settings.guidance_scale
        if prior and sampling != PIPELINE_SAMPLING[settings.family]:
            steps, guidance = PIPELINE_SAMPLING[settings.family]
            raise UserError(
                f"--prior: {name} samples class images in {steps} steps with guidance "
                f"{guidance:g} and cannot be told other, and the race has {sampling[0]} and "
                f"{sampling[1]:g}; run the race so"
            )
        form = "file" if Path(settings.model).is_file() else "folder"
        loads = self.loads_of.get(settings.family, self.loads)
        if form not in loads:
            raise UserError(
                f"--model {settings.model}: {name} reads a model of {settings.family} as a "
                f"{loads[0]} alone"
            )
        if settings.model in MINI_MODELS and self.no_mini is not None:
            raise UserError(f"--model {settings.model}: {name} {self.no_mini}")
        if settings.family == "sd" and not self.reads_sd2 and _is_sd2(Path(settings.model)):
            raise UserError(
                f"--model {settings.model}: is of Stable Diffusion 2.x, and the command for {name} "
                "is of 1.x; race a model of 1.x"
            )


def _is_sd2(folder: Path) -> bool:
    """Return whether a diffusers folder says so; a single file of 2.x does not load as one of 1.x.

    The two differ in how text is padded and in what the network predicts, which no trainer but
    diffusers' reads off the folder: it would train, and something else.
    """
    config = folder / "unet" / "config.json"
    return config.is_file() and bool(json.loads(config.read_text()).get("use_linear_projection"))


def diffusers_command(job: PeerJob) -> Command:
    """Return the command of examples/dreambooth/README_sdxl.md and its siblings."""
    settings = job.settings
    subject, class_prompt = job.prompts
    options = {
        "pretrained_model_name_or_path": job.model,
        "instance_data_dir": job.photos,
        "output_dir": job.output,
        "instance_prompt": subject,
        "resolution": settings.resolution,
        "train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_train_steps": settings.steps,
        "checkpointing_steps": settings.steps + 1,
        "rank": settings.rank,
        "mixed_precision": MIXED_PRECISION[settings.precision],
        "seed": settings.seed,
    }
    # Or the last batch of each epoch is smaller. The script of sd has no such flag.
    if settings.family != "sd":
        options["repeats"] = settings.batch_size
    flags = []
    if job.entrant.prior:
        if settings.resolution != job.own_size:
            raise UserError(
                f"--prior: diffusers samples class images of the model's own size, {job.own_size}, "
                f"and cannot be told other, and the race has {settings.resolution}; run the race so"
            )
        flags = ["--with_prior_preservation"]
        options |= {
            "prior_loss_weight": 1.0,
            "class_data_dir": job.class_images,
            "class_prompt": class_prompt,
            "num_class_images": settings.class_images,
        }
    script = job.checkout / "examples" / "dreambooth" / DIFFUSERS_SCRIPTS[settings.family]
    return _launched(job, script, options, flags)


def kohya_command(job: PeerJob) -> Command:
    """Return the command of sd-scripts' docs/train_network.md and its siblings."""
    settings = job.settings
    subject, _ = job.prompts
    # It starts its loaders anew with each epoch, and the last batch of one may be smaller.
    repeats = repeats_of_one_epoch(settings)
    subset = {"image_dir": str(job.photos), "class_tokens": subject, "num_repeats": repeats}
    dataset = {"resolution": settings.resolution, "batch_size": settings.batch_size}
    config = job.output / "dataset.toml"
    config.write_bytes(tomli_w.dumps({"datasets": [dataset | {"subsets": [subset]}]}).encode())
    options = {
        "pretrained_model_name_or_path": job.model,
        "dataset_config": config,
        "output_dir": job.output,
        "output_name": "lora",
        "save_model_as": "safetensors",
        "network_module": "networks.lora_sd3" if settings.family == "sd3" else "networks.lora",
        "network_dim": settings.rank,
        "network_alpha": settings.rank,
        "learning_rate": LEARNING_RATE,
        "optimizer_type": "AdamW",
        "lr_scheduler": "constant",
        "max_train_steps": settings.steps,
        "mixed_precision": MIXED_PRECISION[settings.precision],
        "seed": settings.seed,
    }
    flags = ["--sdpa", "--cache_latents", "--network_train_unet_only"]
    if settings.family != "sd":
        flags += ["--cache_text_encoder_outputs"]
    if settings.family == "sdxl":
        flags += ["--no_half_vae"]
    if settings.family == "sd3":
        options["t5xxl_max_token_length"] = T5_TOKENS
    return _launched(job, job.checkout / KOHYA_SCRIPTS[settings.family], options, flags)


def _launched(
    job: PeerJob, script: Path, options: dict[str, object], flags: Sequence[str]
) -> Command:
    """Return a script's command by ``accelerate launch``, told what a configuration would say."""
    if not script.is_file():
        raise UserError(f"--checkout {job.checkout}: there is no {script}. Is the path right?")
    launch = [
        *(str(job.python), "-m", "accelerate.commands.launch"),
        *("--config_file", str(write_accelerate(job))),
        *("--num_cpu_threads_per_process", str(job.settings.threads)),
        *(["--cpu"] if job.device == "cpu" else []),
    ]
    words = [*launch, str(script), *(f"--{key}={value}" for key, value in options.items()), *flags]
    return Command([*words, *job.extra], script.parent, job.variables, num_launchers=1)


def onetrainer_command(job: PeerJob) -> Command:
    """Return the command of OneTrainer's docs/CliTraining.md."""
    check_onetrainer(job.checkout)
    script = job.checkout / "scripts" / "train.py"
    words = [str(job.python), str(script), "--config-path", str(write_onetrainer(job)), *job.extra]
    return Command(words, job.checkout, job.variables)


def simpletuner_command(job: PeerJob) -> Command:
    """Return the command of SimpleTuner's documentation/INSTALL.md.

    Raises:
        UserError: there are words behind it: it would read its configuration file, and not them.
    """
    if job.extra:
        words = " ".join(job.extra)
        raise UserError(f"-- {words}: simpletuner reads its configuration alone; leave it out")
    folder = write_simpletuner(job)
    # It is installed beside the interpreter, and looks for config/config.json where it is started.
    words = [str(job.python.with_name("simpletuner")), "train", "config_backend=json"]
    words += [f"accelerate_config={write_accelerate(job)}"]
    return Command(words, folder, job.variables, num_launchers=2)


def ai_toolkit_command(job: PeerJob) -> Command:
    """Return the command of ai-toolkit's README.md."""
    words = [str(job.python), str(job.checkout / "run.py"), str(write_ai_toolkit(job)), *job.extra]
    return Command(words, job.checkout, job.variables)


ALL_LAYERS = "adapts every linear layer of the transformer blocks, not the attention's alone"
TRAINERS = {
    "diffusers": Trainer(
        families=("sd", "sdxl", "sd3"),
        precisions=ALL_PRECISIONS,
        command=diffusers_command,
        bar="Steps",
        result="pytorch_lora_weights.safetensors",
        class_bar="Generating class images",
        note="photos (and class images) are encoded anew in each step",
        loads=("folder",),
        reads_sd2=True,
        # Of accelerate's state, the first that they log.
        begins=r"Distributed environment: ",
    ),
    "kohya": Trainer(
        families=("sd", "sdxl", "sd3"),
        precisions=ALL_PRECISIONS,
        command=kohya_command,
        bar="steps",
        result="lora.safetensors",
        note=f"latents and, but for sd, text are cached; {ALL_LAYERS}",
        loads_of={"sd3": ("file",)},
        no_mini="has networks of the published sizes alone",
        has_help=True,
    ),
    "onetrainer": Trainer(
        families=("sd", "sdxl", "sd3"),
        precisions=ALL_PRECISIONS,
        command=onetrainer_command,
        bar="step",
        result="lora.safetensors",
        note="latents and text are cached",
        complaint=r"^Could not set ",
    ),
    "simpletuner": Trainer(
        families=("sdxl", "sd3"),
        precisions=("bfloat16",),
        command=simpletuner_command,
        bar=r"Epoch \d+/\d+,? Steps",
        result="models/pytorch_lora_weights.safetensors",
        note="latents and text are cached; weights and moments are bfloat16 (adamw_bf16)",
        # Of a single file it takes configuration and encoders from a hub.
        loads=("folder",),
        # It pins what it loads.
        devices=("cuda",),
        no_mini="encodes text as 77 tokens, and the embedded models take fewer",
    ),
    "ai-toolkit": Trainer(
        families=("sd", "sdxl", "sd3"),
        precisions=ALL_PRECISIONS,
        command=ai_toolkit_command,
        bar=NAME,
        result=f"models/{NAME}/{NAME}.safetensors",
        note="latents are cached, text is encoded anew in each step (sd3: 256 tokens of the T5)",
        loads_of={"sd3": ("folder",)},
        counts_from=0,
    ),
}
