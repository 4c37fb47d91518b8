"""Every setting of a stage: what moves, what pulls and what holds, for how many steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fastppt.config_types import AnchorForm, FilePath, Section, Storage
from fastppt.trainables_config import TrainablesConfig


class DenoisingConfig(Section):
    """The diffusion model's own loss: squared error of its prediction, averaged."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the term in the loss."""
    weighting: Literal["uniform", "adaptive", "min_snr"] = "uniform"
    """Weight of a sample: uniform (1); adaptive (1 - gamma of its timestep bin, the overfitting
    indicator of Adaptive Personalized Training, arXiv 2507.02687, equations 1 to 3; it also drives
    the choice of augmented views, and needs a base pass); or min_snr (Hang et al., arXiv
    2303.09556: less where there is little noise; for models that were trained by DDPM)."""
    snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    """Signal-to-noise ratio above which min_snr weighs less."""
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
    """Factor of the sum of squared distances to the anchor. Not calibrated for full-size models:
    `fastppt sweep` tries several on a run of yours."""
    form: AnchorForm = "effective"
    """What is held: raw (the trained tensors), effective (the weights that the network sees),
    decoupled (like weight decay)."""
    to: Literal["start", "zero"] = "start"
    """Where it is held: start (the values when the stage begins; of the network's own weights those
    that the run begins with, the pretrained ones) or zero (an adapter that does nothing)."""
    storage: Storage = "device"
    """Where the anchor of the network's own weights lies: on the device, or in the host's memory,
    from where each step streams it; the same result, bit for bit. What compares with the base needs
    it on the device."""


class PriorPreservationConfig(Section):
    """Pictures of the class, trained on beside the photos (DreamBooth, Ruiz et al., arXiv
    2208.12242, equation 2).
    """

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the loss of the class pictures."""
    folder: FilePath | None = None
    """Folder with pictures of the class; unset draws them by the base model."""
    num_images: Annotated[int, Field(ge=1)] = 100
    """Class pictures; of a folder that holds more, the first by name."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Sampler steps of a class picture; unset takes those of the family's diffusers pipeline."""
    guidance_scale: Annotated[float, Field(ge=0)] | None = None
    """Guidance of the class pictures, up to 1 none; unset takes that of the family's pipeline."""
    sampler: Literal["ddim", "euler"] | None = None
    """How class pictures are drawn: ddim (arXiv 2010.02502, deterministic) or euler (arXiv
    2206.00364, algorithm 2 without its second order); unset takes the family's."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """Class pictures that are drawn at a time."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """Seed of the first class picture; each has one of its own."""
    cache: FilePath | None = None
    """Folder in which class pictures are kept for other runs; unset takes `fastppt/class-images` in
    the user's cache folder."""

    @model_validator(mode="after")
    def _check_folder(self) -> PriorPreservationConfig:
        drawing = ("steps", "guidance_scale", "sampler", "cache")
        given = [name for name in drawing if getattr(self, name) is not None]
        if self.folder is not None and given:
            raise ValueError(
                f"the pictures of folder are taken as they are, and {', '.join(given)} "
                f"{'is' if len(given) == 1 else 'are'} for drawn ones: leave one of the two out"
            )
        return self


class DirectConsistencyConfig(Section):
    """The subject is learned where the tuned network is better than the base (Direct Consistency
    Optimization, Lee et al., arXiv 2402.12004): the loss is -log sigmoid(-beta (L_tuned - L_base)).
    """

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the term in the loss."""
    beta: Annotated[float, Field(gt=0)] = 1000.0
    """How sharply the loss answers to the difference of the two."""


class ObjectivesConfig(Section):
    """What pulls, and what holds, in a stage."""

    denoising: DenoisingConfig | None = None
    anchor: AnchorConfig | None = None
    feature_alignment: FeatureAlignmentConfig | None = None
    attention_alignment: AttentionAlignmentConfig | None = None
    prior_preservation: PriorPreservationConfig | None = None
    direct_consistency: DirectConsistencyConfig | None = None

    @property
    def adaptive(self) -> bool:
        """Say whether the overfitting indicator weighs the samples."""
        return self.denoising is not None and self.denoising.weighting == "adaptive"

    @property
    def need_base(self) -> bool:
        """Say whether a step compares with the base network."""
        return bool(self.adaptive or self._compare)

    @property
    def augment(self) -> bool:
        """Say whether a step may draw augmented views."""
        return self.adaptive and self.denoising is not None and self.denoising.max_augmentation > 0

    @property
    def _compare(self) -> list[str]:
        names = ("feature_alignment", "attention_alignment", "direct_consistency")
        return [name for name in names if getattr(self, name) is not None]

    @model_validator(mode="after")
    def _check_parts(self) -> ObjectivesConfig:
        if self.prior_preservation is not None:
            if self.denoising is None:
                raise ValueError("prior_preservation goes with denoising: add that table")
            others = [*self._compare, *(["adaptive weighting"] if self.adaptive else [])]
            if others:
                raise ValueError(
                    f"prior_preservation and {', '.join(others)} preserve in different ways, and a "
                    "step does either: leave one out"
                )
        return self


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
    moments: Literal["fp32", "8bit"] = "fp32"
    """How the two moments are kept: fp32, or 8bit (Dettmers et al., arXiv 2110.02861), a quarter of
    the memory, for the network's own weights."""


SCALING = ("dora", "boft")
"""Adapters among whose values are lengths or scales of outputs."""


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
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    """Steps of this stage between two checkpoints, beside those of the run's `checkpoint_every`,
    which counts the steps of all stages; 0 adds none."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of a moving average of what is trained, which then is what the stage shows, saves and
    hands on; 0 keeps none."""
    optimizer: OptimizerConfig = OptimizerConfig()
    trainables: TrainablesConfig = TrainablesConfig()
    objectives: ObjectivesConfig = ObjectivesConfig()

    @model_validator(mode="after")
    def _check_parts(self) -> StageConfig:
        moving, objectives = self.trainables, self.objectives
        if not moving.given:
            raise ValueError("needs something to train: add a table such as trainables.lora")
        if objectives.denoising is None and objectives.direct_consistency is None:
            raise ValueError(
                "needs an objective that teaches: add the table objectives.denoising or "
                "objectives.direct_consistency"
            )
        if self.base_every > 1 and not objectives.need_base:
            raise ValueError(
                f"base_every is {self.base_every}, and no objective compares with the base: "
                "leave it out"
            )
        if self.base_every > 1 and objectives.direct_consistency is not None:
            raise ValueError(
                f"base_every is {self.base_every}, and direct_consistency compares with the base "
                "in each step: leave one out"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps must be below steps ({self.steps}), got {self.warmup_steps}"
            )
        return self

    @model_validator(mode="after")
    def _check_decoupled(self) -> StageConfig:
        anchor = self.objectives.anchor
        rates = [rate for table in self.trainables.given.values() for rate in table.rates.values()]
        largest = max(rates, default=0.0)
        if anchor is None or anchor.form != "decoupled" or round(largest * anchor.weight, 9) <= 1:
            return self
        raise ValueError(
            f"objectives.anchor.weight: a decoupled anchor pulls learning rate * weight of the way "
            f"back in each step, and {largest:g} * {anchor.weight:g} is past it; set weight to "
            f"{1 / largest:g} at most, which leaves each step's own move alone"
        )

    @model_validator(mode="after")
    def _check_weights(self) -> StageConfig:
        anchor, weights = self.objectives.anchor, self.trainables.network_weights
        if anchor is not None and anchor.to == "zero" and weights is not None:
            raise ValueError(
                "objectives.anchor.to: the network's own weights at zero are no network; set it to "
                '"start"'
            )
        if anchor is not None and anchor.to == "zero" and self.trainables.network in SCALING:
            raise ValueError(
                f"objectives.anchor.to: {self.trainables.network} with its scales at zero is no "
                'adapter that does nothing; set it to "start"'
            )
        if anchor is not None and anchor.storage == "host":
            if weights is None:
                raise ValueError(
                    "objectives.anchor.storage: host is for anchors of the network's own weights "
                    "(full, custom_diffusion); leave it out"
                )
            if self.objectives.need_base:
                raise ValueError(
                    "objectives.anchor.storage: an objective compares with the base, whose weights "
                    'are the anchor, and those must then lie on the device; set it to "device"'
                )
        if self.optimizer.moments == "8bit" and weights is None:
            raise ValueError(
                "optimizer.moments: 8bit is for the network's own weights (full, "
                "custom_diffusion); leave it out"
            )
        return self
