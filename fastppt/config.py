"""Every setting of a run, with its default and the sentence that explains it.

This is the only home of defaults. Recipes (``recipes/*.toml``), a user's TOML file and the command
line's flags are laid over them in that order; ``config_io`` does the laying.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

T = TypeVar("T", Path, str)


def _check_path(path: T) -> T:
    if "\0" in str(path):
        raise ValueError("must not hold the character NUL, which no file name can")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{str(path)!r} is not text in UTF-8; rename it") from None
    return path


# Text in a TOML file; the one type that is converted.
FilePath = Annotated[Path, Field(strict=False), AfterValidator(_check_path)]
# A path, or a name at the hub.
Place = Annotated[str, Field(min_length=1), AfterValidator(_check_path)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Engine = Literal["auto", "eager", "compile", "graph", "graph+compile"]
CompileScope = Literal["blocks", "network"]
AnchorForm = Literal["raw", "effective", "decoupled"]


class Section(BaseModel):
    """One table of the TOML file. Unknown keys are refused, values never change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @field_validator("*", check_fields=False)
    @classmethod
    def _check_size(cls, value: object) -> object:
        # Nor could a TOML file take back a number of thousands of digits.
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("must be below 2^63")
        return value


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
    contexts: Annotated[list[str], Field(min_length=1)] = [
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


class LoraConfig(Section):
    """Low-rank adapters on attention projections (Hu et al., arXiv 2106.09685): W + alpha/rank
    * B A.
    """

    rank: Annotated[int, Field(ge=1)] = 32
    """Inner dimension of the adapters."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Strength: the product B A is scaled by alpha / rank; unset means alpha = rank."""
    learning_rate: Annotated[float, Field(ge=0)] = 1e-4
    """Learning rate of the adapters."""
    targets: list[str] | Literal["up"] | None = None
    """Patterns of the attention projections that get an adapter, such as `*.to_q`; * matches any
    text, dots included. "up" takes those of the second half of the network (a UNet's up blocks),
    where the backward pass can stop early. Unset takes them all."""
    init: FilePath | None = None
    """LoRA file, or folder of a finished run, to start from; unset starts from zero."""

    @field_validator("targets", mode="before")
    @classmethod
    def _check_targets(cls, targets: object) -> object:
        is_list = isinstance(targets, list) and all(isinstance(each, str) for each in targets)
        if targets is None or targets == "up" or (is_list and targets):
            return targets
        raise ValueError(f'must be "up" or a list of patterns, got {targets!r}')


class TextEncoderLoraConfig(Section):
    """Low-rank adapters on the attention projections of the CLIP text encoders."""

    rank: Annotated[int, Field(ge=1)] = 32
    """Inner dimension of the adapters."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Strength: the product B A is scaled by alpha / rank; unset means alpha = rank."""
    learning_rate: Annotated[float, Field(ge=0)] = 5e-6
    """Learning rate of these adapters."""


class TokensConfig(Section):
    """Embeddings of a new word, learned in every CLIP text encoder (Textual Inversion, arXiv
    2208.01618).
    """

    vectors: Annotated[int, Field(ge=1)] = 1
    """Embeddings that the word is made of."""
    init: Annotated[str, Field(min_length=1)] | None = None
    """Words whose embeddings the new ones start from, one by one where they are as many tokens as
    vectors, else all from their mean; unset takes the class noun."""
    learning_rate: Annotated[float, Field(ge=0)] = 5e-4
    """Learning rate of the embeddings."""
    keep_norm: bool = False
    """Scale each embedding back to the length of what `init` gives, after every step."""


class TrainablesConfig(Section):
    """What moves in a stage."""

    lora: LoraConfig | None = None
    text_encoder_lora: TextEncoderLoraConfig | None = None
    tokens: TokensConfig | None = None

    @property
    def move_text(self) -> bool:
        """Say whether what a prompt is encoded to changes during training."""
        return self.text_encoder_lora is not None or self.tokens is not None


class DenoisingConfig(Section):
    """The diffusion model's own loss: squared error of its prediction, averaged."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the term in the loss."""
    weighting: Literal["uniform", "adaptive"] = "uniform"
    """Weight of a sample: uniform (1), or adaptive (1 - gamma of its timestep bin, the overfitting
    indicator of Adaptive Personalized Training, arXiv 2507.02687, equations 1 to 3; it also drives
    the choice of augmented views, and needs a base pass)."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """How sharply the indicator answers when the tuned loss falls below the base's; unset takes
    the family's."""
    smoothing: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Part of a new loss in the indicator's moving averages."""
    bins: Annotated[int, Field(ge=1)] = 10
    """Equal parts of the timestep range, each with an indicator of its own."""
    max_augmentation: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Largest probability of an augmented view; 0 never augments."""


class FeatureAlignmentConfig(Section):
    """Mean and standard deviation of the features held to the base's (Adaptive Personalized
    Training, arXiv 2507.02687, equations 4 and 5).
    """

    weight: Annotated[float, Field(ge=0)] = 30.0
    """Factor of either term in the loss."""
    layers: Annotated[list[str], Field(min_length=1)] | None = None
    """Patterns of the modules whose outputs are held; unset takes the family's."""


class AttentionAlignmentConfig(Section):
    """Attention maps of the text held to the base's (Adaptive Personalized Training, arXiv
    2507.02687, equation 6).
    """

    weight: Annotated[float, Field(ge=0)] = 3e-4
    """Factor of the term in the loss."""
    layers: Annotated[list[str], Field(min_length=1)] | None = None
    """Patterns of the attention modules whose maps are held; unset takes the family's."""


class AnchorConfig(Section):
    """The L2 pull back to where the parameters were (Preserve and Personalize, arXiv
    2505.19519).
    """

    weight: Annotated[float, Field(ge=0)] = 1e-3
    """Factor of the sum of squared distances to the anchor. Not calibrated for full-size models."""
    form: AnchorForm = "effective"
    """What is held: raw (the trained tensors), effective (the weights that the network sees),
    decoupled (like weight decay)."""
    to: Literal["start", "zero"] = "start"
    """Where it is held: start (the values when the stage begins) or zero (an adapter that does
    nothing)."""


class ObjectivesConfig(Section):
    """What pulls, and what holds, in a stage."""

    denoising: DenoisingConfig | None = None
    anchor: AnchorConfig | None = None
    feature_alignment: FeatureAlignmentConfig | None = None
    attention_alignment: AttentionAlignmentConfig | None = None

    @property
    def adaptive(self) -> bool:
        """Say whether the overfitting indicator weighs the samples."""
        return self.denoising is not None and self.denoising.weighting == "adaptive"

    @property
    def need_base(self) -> bool:
        """Say whether a step compares with the base network."""
        aligned = self.feature_alignment is not None or self.attention_alignment is not None
        return self.adaptive or aligned

    @property
    def augment(self) -> bool:
        """Say whether a step may draw augmented views."""
        return self.adaptive and self.denoising is not None and self.denoising.max_augmentation > 0


class OptimizerConfig(Section):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the mean of the gradient."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the mean of the squared gradient."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator of the update."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Decoupled pull to zero, in units of the learning rate."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Longest gradient that a step takes, the anchor's part included; longer ones are scaled
    down, 0 never does."""


class StageConfig(Section):
    """Some trainables, some objectives, a number of steps."""

    steps: Annotated[int, Field(ge=1)] = 500
    """Optimizer steps of the stage."""
    batch_size: Annotated[int, Field(ge=1)] = 1
    """Photos that one forward pass sees."""
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    """Forward and backward passes of one optimizer step; their gradients are averaged."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up: constant, or down to zero at the end of
    the stage."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises from zero."""
    base_every: Annotated[int, Field(ge=1)] = 1
    """Steps from one base pass to the next, where an objective compares with the base; the steps
    between go without the alignments, and weigh by the indicator as it was."""
    optimizer: OptimizerConfig = OptimizerConfig()
    trainables: TrainablesConfig = TrainablesConfig()
    objectives: ObjectivesConfig = ObjectivesConfig()

    @model_validator(mode="after")
    def _check_parts(self) -> StageConfig:
        if self.trainables.lora is None:
            raise ValueError("needs something to train: add a table such as trainables.lora")
        if self.objectives.denoising is None:
            raise ValueError("needs an objective that teaches: add the table objectives.denoising")
        if self.base_every > 1 and not self.objectives.need_base:
            raise ValueError(
                f"base_every is {self.base_every}, and no objective compares with the base: "
                "leave it out"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps must be below steps ({self.steps}), got {self.warmup_steps}"
            )
        return self


class RunConfig(Section):
    """A whole run."""

    recipe: str | None = None
    """Recipe that the run is laid over; `fastppt recipes` lists them."""
    output: FilePath | None = None
    """Folder for everything that the run writes (required)."""
    name: Annotated[str, Field(pattern=r"^[\w][\w .-]*$")] | None = None
    """Name of the LoRA file; unset takes the name of the output folder."""
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
    """Steps between two checkpoints; 0 writes one only where a run is interrupted."""
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
    def augment(self) -> bool:
        """Say whether a step of any stage may draw augmented views."""
        return any(stage.objectives.augment for stage in self.stage)

    @property
    def move_text(self) -> bool:
        """Say whether what a prompt is encoded to changes during training."""
        return self.stage[0].trainables.move_text

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
    def _check_stages(self) -> RunConfig:
        first = self.stage[0].trainables.lora
        for index, stage in enumerate(self.stage[1:], start=1):
            for kind, keys in (
                ("text_encoder_lora", ("rank", "alpha")),
                ("tokens", ("vectors", "init")),
            ):
                one = getattr(stage.trainables, kind)
                at_first = getattr(self.stage[0].trainables, kind)
                if (one is None) != (at_first is None):
                    raise ValueError(
                        f"stage.{index}.trainables.{kind}: must be there in all stages or in none"
                    )
                for key in keys if one is not None else ():
                    if getattr(one, key) != getattr(at_first, key):
                        raise ValueError(
                            f"stage.{index}.trainables.{kind}.{key} must be that of stage 0 "
                            f"({getattr(at_first, key)}): a later stage goes on with the same ones"
                        )
            lora = stage.trainables.lora
            if first is None or lora is None:
                continue
            for key in ("rank", "alpha", "targets"):
                if getattr(lora, key) != getattr(first, key):
                    raise ValueError(
                        f"stage.{index}.trainables.lora.{key} must be that of stage 0 "
                        f"({getattr(first, key)}): a later stage goes on with the same adapters"
                    )
            if lora.init is not None:
                raise ValueError(
                    f"stage.{index}.trainables.lora.init: only stage 0 can start from a file"
                )
        return self


class Recipe(Section):
    """A published method as a file: what it is, where it comes from, and its part of a run."""

    summary: str
    """One line for `fastppt recipes`."""
    source: str
    """Paper and place in it, and what is our choice."""
    families: Annotated[list[str], Field(min_length=1)]
    """Model families for which the recipe exists."""
