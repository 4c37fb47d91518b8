"""What the preservation bench compares, and every number of it: the one place to change them.

Published numbers are for networks a thousand times as large, so all methods get the same number
of steps here, and rates, weights and scales of losses that suit the mini model. All else is the
recipe's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from fastppt.evaluation.exam import EvaluationSettings

Settings = Mapping[str, object]

STEPS, QUICK_STEPS = 200, 6
EVALUATION = EvaluationSettings(samples=24, sampler_steps=8)
# Of rare-token's steps those of its first stage, in which the word is learned.
WORD_PART = 0.2
RANK = 16
LORA_RATE, TEXT_LORA_RATE, WORD_RATE, FULL_RATE, CROSS_RATE = 2e-3, 1e-4, 5e-3, 1e-4, 5e-4
# Of the anchor in the recipes on LoRA (effective form) and on the network's own weights (raw form):
# the "calibrated anchor weights" of the bench's own report.
LORA_ANCHOR_WEIGHT, FULL_ANCHOR_WEIGHT = 3e-3, 1e-1
# Scales of losses, chosen by a trial on one subject and seed. With the recipe's 1000 for the
# indicator's temperature, apt-ata-rs reached in as many steps a likeness of .51 instead of .68.
INDICATOR_TEMPERATURE, DCO_BETA = 100.0, 100.0
# The recipe has 30. Weights of 0.3 to 3 held the model still (a likeness of .22 to .26; the base
# has .25), 3e-3 almost (.36).
FEATURE_WEIGHT = 3e-4
NUM_CLASS_IMAGES, CLASS_IMAGE_STEPS, GUIDANCE_SCALE = 100, 20, 4.0

NOUNS = ("robot", "boat", "mug", "tree", "car", "cat", "house", "fish", "chair", "rocket")
FIRST_SUBJECT = 7_000

LORA, PPT_LORA, LORA_PRIOR = "lora", "ppt-lora", "lora-prior"
DREAMBOOTH, PPT_DREAMBOOTH = "dreambooth", "ppt-dreambooth"
DREAMBOOTH_PRIOR, RARE_TOKEN = "dreambooth-prior", "rare-token"
CUSTOM, TEXTUAL_INVERSION, DCO = "custom-diffusion", "textual-inversion", "dco"
APT_BASE, APT_ATA, APT_ATA_RS, APT = "apt-base", "apt-ata", "apt-ata-rs", "apt"

# Anchor weights by the method that is swept. A sweep begins with the same training without one.
SWEEPS: Mapping[str, tuple[float, ...]] = {
    PPT_LORA: (1e-4, 1e-3, 3e-3, 1e-2, 1e-1),
    PPT_DREAMBOOTH: (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
}

OBJECTIVES = "stage.0.objectives"
ANCHOR_WEIGHT = f"{OBJECTIVES}.anchor.weight"
LORA_RANK, LORA_KEY = "stage.0.trainables.lora.rank", "stage.0.trainables.lora.learning_rate"
TEXT_RANK = "stage.0.trainables.text_encoder_lora.rank"
TEXT_KEY = "stage.0.trainables.text_encoder_lora.learning_rate"
WORD_KEY = "stage.0.trainables.tokens.learning_rate"
FULL_KEY = "stage.0.trainables.full.learning_rate"

OF_LORA: Settings = {LORA_RANK: RANK, LORA_KEY: LORA_RATE}
OF_FULL: Settings = {FULL_KEY: FULL_RATE}
OF_WORD: Settings = {WORD_KEY: WORD_RATE}
OF_APT: Settings = {**OF_LORA, TEXT_RANK: RANK, TEXT_KEY: TEXT_LORA_RATE, **OF_WORD}
OF_INDICATOR: Settings = {f"{OBJECTIVES}.denoising.temperature": INDICATOR_TEMPERATURE}
OF_FEATURES: Settings = {f"{OBJECTIVES}.feature_alignment.weight": FEATURE_WEIGHT}
OF_PRIOR: Settings = {
    f"{OBJECTIVES}.prior_preservation.num_images": NUM_CLASS_IMAGES,
    f"{OBJECTIVES}.prior_preservation.steps": CLASS_IMAGE_STEPS,
    f"{OBJECTIVES}.prior_preservation.guidance_scale": GUIDANCE_SCALE,
    f"{OBJECTIVES}.prior_preservation.batch_size": 25,
}
APT_OBJECTIVES: Mapping[str, Settings] = {
    APT_BASE: {},
    APT_ATA: OF_INDICATOR,
    APT_ATA_RS: {**OF_INDICATOR, **OF_FEATURES},
    APT: {**OF_INDICATOR, **OF_FEATURES},
}


@dataclass(frozen=True)
class Method:
    """One way to teach a subject.

    Attributes:
        name: As it is reported.
        recipe: Whose stages it has.
        settings: What is laid over the recipe.
        family: Of which family's variant the stages are. Those of another one than the mini
            model's are given to the trainer as stages of one's own.
        sweep: Where it is a part of one of the `SWEEPS`, the method that is swept.
        anchor_weight: Its weight in that sweep.
        steps: Optimizer steps of each stage, as parts of all steps.
    """

    name: str
    recipe: str
    settings: Settings = field(default_factory=dict)
    family: str = "sdxl"
    sweep: str | None = None
    anchor_weight: float | None = None
    steps: tuple[float, ...] = (1.0,)


def apt_without(part: str, settings: Settings) -> Method:
    return Method(f"{APT} without {part}", APT, {**OF_APT, **APT_OBJECTIVES[APT], **settings})


WITHOUT_ADAPTING = apt_without(
    "adaptive adjustment", {f"{OBJECTIVES}.denoising.weighting": "uniform"}
)
WITHOUT_FEATURES = apt_without("features", {f"{OBJECTIVES}.feature_alignment.weight": 0.0})

# The published ablation, each part added to those before it: methods without and with it.
APT_ADDED = {
    "adaptive adjustment": (APT_BASE, APT_ATA),
    "features": (APT_ATA, APT_ATA_RS),
    "attention": (APT_ATA_RS, APT),
}
# And each taken from the whole. Without attention that is apt-ata-rs, which is compared already.
APT_TAKEN = {
    "adaptive adjustment": (WITHOUT_ADAPTING.name, APT),
    "features": (WITHOUT_FEATURES.name, APT),
}

METHODS: tuple[Method, ...] = (
    Method(LORA, "lora", OF_LORA, sweep=PPT_LORA, anchor_weight=0.0),
    Method(
        PPT_LORA,
        "ppt-lora",
        {**OF_LORA, ANCHOR_WEIGHT: LORA_ANCHOR_WEIGHT},
        sweep=PPT_LORA,
        anchor_weight=LORA_ANCHOR_WEIGHT,
    ),
    Method(LORA_PRIOR, "lora-prior", {**OF_LORA, **OF_PRIOR}),
    Method(DREAMBOOTH, "dreambooth", OF_FULL, "sd", sweep=PPT_DREAMBOOTH, anchor_weight=0.0),
    Method(
        PPT_DREAMBOOTH,
        "ppt-dreambooth",
        {**OF_FULL, ANCHOR_WEIGHT: FULL_ANCHOR_WEIGHT},
        "sd",
        sweep=PPT_DREAMBOOTH,
        anchor_weight=FULL_ANCHOR_WEIGHT,
    ),
    Method(DREAMBOOTH_PRIOR, "dreambooth-prior", {**OF_FULL, **OF_PRIOR}, "sd"),
    Method(
        RARE_TOKEN,
        "rare-token",
        {**OF_WORD, "stage.1.trainables.full.learning_rate": FULL_RATE}
        # Its checkpoints are of no use here.
        | {"stage.1.checkpoint_every": 0},
        "sd",
        steps=(WORD_PART, 1 - WORD_PART),
    ),
    Method(
        CUSTOM,
        "custom-diffusion",
        {"stage.0.trainables.custom_diffusion.learning_rate": CROSS_RATE, **OF_WORD}
        # "ktn" is no word of the mini model's, and all methods see one photo a step.
        | {"stage.0.trainables.tokens.init": "sks", "stage.0.batch_size": 1},
        "sd",
    ),
    Method(
        TEXTUAL_INVERSION,
        "textual-inversion",
        {**OF_WORD, "stage.0.gradient_accumulation": 1},
    ),
    Method(DCO, "dco", {**OF_LORA, **OF_WORD, f"{OBJECTIVES}.direct_consistency.beta": DCO_BETA}),
    *(Method(name, name, {**OF_APT, **own}) for name, own in APT_OBJECTIVES.items()),
    WITHOUT_ADAPTING,
    WITHOUT_FEATURES,
)


def sweep_methods() -> list[Method]:
    """Return the methods of the sweeps that are not among `METHODS`."""
    return [
        replace(
            method,
            name=f"{method.name}, weight {weight:g}",
            settings={**method.settings, ANCHOR_WEIGHT: weight},
            anchor_weight=weight,
        )
        for method in METHODS
        for weight in SWEEPS.get(method.name, ())
        if weight != method.anchor_weight
    ]


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        subjects: Of nouns of their own.
        seeds: Trainings of each method on each subject.
        steps: Optimizer steps of each training, all stages together.
        evaluation: How each model is asked.
        settings: Laid over every method's.
    """

    subjects: int
    seeds: int
    steps: int = STEPS
    evaluation: EvaluationSettings = EVALUATION
    settings: Settings = field(default_factory=dict)

    def settings_of(self, method: Method) -> dict[str, object]:
        """Return all that is laid over a method's recipe."""
        steps = [max(1, round(part * self.steps)) for part in method.steps]
        counts = {f"stage.{index}.steps": count for index, count in enumerate(steps)}
        own = {**method.settings, **self.settings}
        if f"{OBJECTIVES}.prior_preservation.num_images" not in method.settings:
            own = {key: value for key, value in own.items() if "prior_preservation" not in key}
        return {**own, **counts}


def quick(plan: Plan) -> Plan:
    """Return the plan with almost nothing to do: for a look at the bench, not at the methods."""
    few = {
        f"{OBJECTIVES}.prior_preservation.num_images": 2,
        f"{OBJECTIVES}.prior_preservation.steps": 2,
    }
    asked = EvaluationSettings(samples=6, sampler_steps=2)
    return replace(plan, steps=min(plan.steps, QUICK_STEPS), evaluation=asked, settings=few)


def describe(plan: Plan, methods: Sequence[Method]) -> dict[str, object]:
    """Return all numbers of the plan, of which JSON can be made."""
    return {
        "subjects": plan.subjects,
        "seeds": plan.seeds,
        "steps": plan.steps,
        "evaluation": asdict(plan.evaluation),
        "methods": {
            method.name: {"recipe": method.recipe, **plan.settings_of(method)} for method in methods
        },
    }
