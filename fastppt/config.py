"""Every setting of a run, with its default and the sentence that explains it.

This and ``stage_config`` are the only home of defaults. Recipes (``recipes/*.toml``), a user's TOML
file and the command line's flags are laid over them in that order; ``config_io`` does the laying.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fastppt.config_types import CompileScope, Engine, FilePath, Place, Section, Seed, Storage
from fastppt.stage_config import AnchorConfig, StageConfig
from fastppt.trainables_config import (
    NETWORK_TRAINABLES,
    LoraConfig,
    TrainableConfig,
    TrainablesConfig,
)


class ModelConfig(Section):
    """The pretrained model."""

    path: Place | None = None
    """Model to start from: a hub id, a diffusers folder, a single .safetensors checkpoint, or the
    name of an embedded mini model, which `fastppt doctor` lists (required)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; unset takes the hub's default."""
    variant: Annotated[str, Field(pattern=r"^[\w-]+$")] | None = None
    """Variant of the weight files of a hub id or folder, such as fp16; unset takes the plain
    ones."""
    config_folder: FilePath | None = None
    """Diffusers folder whose configuration files and tokenizers belong to a single-file
    checkpoint; unset asks the hub for them."""
    vae: Place | None = None
    """Another VAE: hub id, diffusers folder or .safetensors file; unset takes the model's own."""
    large_text_encoder: bool = True
    """Use the model's largest text encoder where it can do without (a T5 beside two CLIPs)."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens that the largest text encoder reads of a prompt, where the model leaves the choice;
    unset takes as many as the other encoders read."""
    attention: Literal["sdpa", "xformers", "flash"] = "sdpa"
    """Who computes attention: sdpa (torch's own), xformers, or flash (the package flash-attn)."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of base weights and activations; auto is bf16 on a GPU and fp32 on the CPU.
    Adapters are always fp32."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """Where to train: auto (a GPU if there is one), cpu, cuda, or cuda:N."""


class PhotosConfig(Section):
    """The photos of the subject."""

    folder: FilePath | None = None
    """Folder with the .jpg .jpeg .png .webp photos of the subject (required)."""
    captions: FilePath | None = None
    """Captions, each with {subject} where the subject is named: a TOML file of lines such as
    `"photo.jpg" = "{subject} on a chair"`, or a folder with captions.toml or .txt files named like
    the photos. What the photos' folder holds is then not read; unset reads that."""
    resolution: Annotated[int, Field(ge=8)] | None = None
    """Side in pixels to which photos are scaled (short side) and centre-cropped; unset takes
    the model's own."""
    buckets: bool = False
    """Crop each photo to the nearest of a few aspect ratios of the same area, not to a square."""
    views: Annotated[int, Field(ge=1)] = 16
    """Augmented encodings a photo, made before training where an objective augments."""
    max_zoom_out: Annotated[float, Field(ge=1, le=10)] = 3.0
    """An augmented view shows the photo smaller by a factor drawn from 1 to this."""
    max_rotation: Annotated[float, Field(ge=0, le=180)] = 15.0
    """An augmented view is turned by an angle drawn from minus to plus this, in degrees."""
    fill: Literal["reflect", "edge"] = "reflect"
    """What an augmented view shows outside the photo: its mirror image, or its edge drawn out."""
    refresh_every: Annotated[int, Field(ge=0)] = 0
    """Steps in which one photo's augmented views are drawn and encoded anew, beside the steps and
    photo after photo; 0 keeps the first ones. The VAE stays on the device then."""


class PromptsConfig(Section):
    """The words for the subject."""

    class_noun: Annotated[str, Field(min_length=1)] | None = None
    """Everyday noun of what the photos show, such as `dog` (required)."""
    token: Annotated[str, Field(min_length=1)] = "sks"
    """Rare word that comes to stand for the subject; where tokens are trained, the new word."""
    subject: Annotated[str, Field(pattern=r"\{token\}")] = "{token} {class_noun}"
    """What {subject} stands for in prompts and captions."""
    template: Annotated[str, Field(pattern=r"\{subject\}")] = "a photo of {subject}"
    """Prompt of a photo without a caption of its own."""
    class_prompt: Annotated[str, Field(pattern=r"\{class_noun\}")] = "a photo of a {class_noun}"
    """Prompt of the plain class, as the base model knows it."""
    contexts: Annotated[list[str], Field(min_length=1)] = [  # noqa: RUF012
        "a photo of {subject} on the beach",
        "a photo of {subject} in the snow",
        "a photo of {subject} in the jungle",
    ]
    """Prompts of the sample grid beside the subject and the class prompt."""


class SamplesConfig(Section):
    """The pictures that a run draws of its progress."""

    enabled: bool = True
    """Draw a grid of samples before and after training."""
    steps: Annotated[int, Field(ge=1)] = 25
    """Sampler steps of a picture."""
    guidance_scale: Annotated[float, Field(ge=0)] = 5.0
    """Classifier-free guidance scale; up to 1 there is none."""
    seed: Seed = 0
    """Seed of the pictures; the same in every grid of the run."""


class RunConfig(Section):
    """A whole run."""

    recipe: str | None = None
    """Recipe that the run is laid over; `fastppt recipes` lists them."""
    output: FilePath | None = None
    """Folder for everything that the run writes (required)."""
    name: Annotated[str, Field(pattern=r"^[\w][\w .-]*$")] | None = None
    """Name of the LoRA file, or of the checkpoint; unset takes the name of the output folder."""
    seed: Seed = 0
    """Seed of all that is drawn; on the CPU the same seed gives the same run, bit for bit."""
    engine: Engine = "auto"
    """How a step runs: eager, compile (the network by torch.compile), graph (the whole step in
    CUDA graphs), graph+compile, or auto: graph on a GPU, eager on the CPU."""
    compile_scope: CompileScope = "blocks"
    """What torch.compile sees as one: blocks (each transformer block by itself), or network (all of
    it), whose gradients are then compared with eager ones before the first step."""
    deterministic: bool = False
    """Take only algorithms that give the same bits every time, so that a run repeats bit for bit on
    a GPU too; slower there. On the CPU all of them do."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the network's blocks and compute the rest again in the backward
    pass: the same gradients from less memory, in longer steps."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between two looks at the metrics."""
    sample_every: Annotated[int, Field(ge=0)] = 0
    """Steps between two sample grids; 0 draws them before and after only."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    """Steps between two checkpoints; 0 writes one only where a run is interrupted, or its result
    cannot be saved."""
    keep_checkpoints: Annotated[int, Field(ge=0)] = 0
    """Checkpoints that are kept, the newest ones; 0 keeps all."""
    max_bad_steps: Annotated[int, Field(ge=1)] = 20
    """Steps in a row whose loss or gradient is not finite, after which the run stops. Such a step
    changes nothing. The run learns of it when it reads its metrics, up to twice `log_every` steps
    later. Steps that fp16 skips while its loss scale is above 1 do not count."""
    save_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the tensors in the LoRA files; fp32 keeps what was trained, bit for bit."""
    tensorboard: bool = False
    """Write TensorBoard curves to OUTPUT/tensorboard (needs the extra `tensorboard`)."""
    plots: bool = False
    """Draw the metrics as pictures into OUTPUT/plots at the end; `fastppt plot` draws them at any
    time."""
    model: ModelConfig = ModelConfig()
    photos: PhotosConfig = PhotosConfig()
    prompts: PromptsConfig = PromptsConfig()
    samples: SamplesConfig = SamplesConfig()
    stage: Annotated[list[StageConfig], Field(min_length=1)]

    @property
    def method(self) -> str:
        """What to call the run's method: its recipe, or that its stages are its own."""
        return self.recipe or "own stages"

    @property
    def steps_in_words(self) -> str:
        """The steps of each stage, such as `100 + 400`."""
        return " + ".join(str(stage.steps) for stage in self.stage)

    @property
    def augment(self) -> bool:
        """Say whether a step of any stage may draw augmented views."""
        return any(stage.objectives.augment for stage in self.stage)

    @property
    def prior_preservation(self) -> bool:
        """Say whether any stage trains on class images."""
        return any(stage.objectives.prior_preservation is not None for stage in self.stage)

    @property
    def move_text(self) -> bool:
        """Say whether what a prompt is encoded to changes in any stage."""
        return any(stage.trainables.move_text for stage in self.stage)

    @property
    def trainables(self) -> dict[str, tuple[int, TrainableConfig]]:
        """Each trainable of the run by name: its first stage, and its table there."""
        found: dict[str, tuple[int, TrainableConfig]] = {}
        for index, stage in enumerate(self.stage):
            for name, table in stage.trainables.given.items():
                found.setdefault(name, (index, table))
        order = [name for name in TrainablesConfig.model_fields if name in found]
        return {name: found[name] for name in order}

    @property
    def network(self) -> str | None:
        """Name of what moves in the network in any stage; None where nothing does."""
        return next((name for name in self.trainables if name in NETWORK_TRAINABLES), None)

    @property
    def kept_weights(self) -> Storage | None:
        """Where the pretrained weights are kept beside trained ones, for anchors and base passes.

        None where nothing needs them, or none of the network's own weights is trained.
        """
        training = [stage.trainables.network_weights is not None for stage in self.stage]
        if not any(training):
            return None
        if any(stage.objectives.need_base for stage in self.stage[training.index(True) :]):
            return "device"
        return next((anchor.storage for _, anchor in self._weight_anchors), None)

    @property
    def _weight_anchors(self) -> list[tuple[int, AnchorConfig]]:
        """The anchors that hold the network's own weights, by stage."""
        return [
            (index, stage.objectives.anchor)
            for index, stage in enumerate(self.stage)
            if stage.trainables.network_weights is not None
            and stage.objectives.anchor is not None
            and stage.objectives.anchor.weight > 0
        ]

    @model_validator(mode="after")
    def _check_storage(self) -> RunConfig:
        for index, anchor in self._weight_anchors:
            if anchor.storage != self.kept_weights:
                raise ValueError(
                    f"stage.{index}.objectives.anchor.storage must be {self.kept_weights}, got "
                    f"{anchor.storage}: all stages are held to the same weights, the pretrained "
                    "ones, and a stage that compares with the base takes them from the device"
                )
        return self

    @model_validator(mode="after")
    def _check_scope(self) -> RunConfig:
        if self.compile_scope != "blocks" and "compile" not in self.engine:
            raise ValueError(
                f"compile_scope: engine {self.engine} compiles nothing; set engine to compile or "
                "graph+compile, or leave compile_scope out"
            )
        return self

    @model_validator(mode="after")
    def _check_refresh(self) -> RunConfig:
        if self.photos.refresh_every > 0 and not self.augment:
            raise ValueError(
                "photos.refresh_every: no stage draws augmented views, so there are none to draw "
                "anew; leave it out, or set stage.N.objectives.denoising.weighting to adaptive"
            )
        return self

    @model_validator(mode="after")
    def _check_class_images(self) -> RunConfig:
        if self.photos.buckets and self.prior_preservation:
            raise ValueError(
                "photos.buckets: class images are square, and one batch has them beside the "
                "photos; leave buckets out, or the table prior_preservation"
            )
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> RunConfig:
        moving = [name for name in self.trainables if name in NETWORK_TRAINABLES]
        if len(moving) > 1:
            raise ValueError(
                f"{' and '.join(moving)} move the network in different stages, and a run has one "
                "trainable of the network"
            )
        for index, stage in enumerate(self.stage):
            for name, table in stage.trainables.given.items():
                first, at_first = self.trainables[name]
                if index > first:
                    _check_same(f"stage.{index}.trainables.{name}", table, at_first, first)
        return self


# Keys of trainables that may differ from stage to stage.
BY_STAGE = ("learning_rate", "learning_rate_1d", "keep_norm")


def _check_same(place: str, table: TrainableConfig, first: TrainableConfig, stage: int) -> None:
    """Refuse a trainable that goes on in a later stage with another form."""
    may_differ = (*BY_STAGE, "init") if isinstance(table, LoraConfig) else BY_STAGE
    if isinstance(table, LoraConfig) and table.init is not None:
        raise ValueError(f"{place}.init: only stage {stage}, its first, can start from a file")
    for key in type(table).model_fields:
        ours, theirs = getattr(table, key), getattr(first, key)
        if key not in may_differ and ours != theirs:
            raise ValueError(
                f"{place}.{key} must be that of stage {stage} ({theirs}): a later stage goes on "
                "with the same ones"
            )


class Recipe(Section):
    """A published method as a file: what it is, where it comes from, and its part of a run."""

    summary: str
    """One line for `fastppt recipes`."""
    source: str
    """Paper and place in it, and what is our choice."""
    families: Annotated[list[str], Field(min_length=1)]
    """Model families for which the recipe exists."""
