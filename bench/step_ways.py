"""What takes a step in the step bench: our trainer by recipe and engine, and what it is held to."""

import copy
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from rich.console import Console
from torch import Tensor, nn

from bench.networks import FAMILY_OF, FULL_MODELS, build_pipeline
from bench.peer import DiffusersStep, Subject, add_adapters
from fastppt.config import ModelConfig, RunConfig
from fastppt.config_io import build_config, load_recipe
from fastppt.data.photos import crop_photo, find_photos
from fastppt.data.prompts import class_prompt, subject_prompt
from fastppt.families.base import Family
from fastppt.families.loading import make_family
from fastppt.families.names import MINI_MODELS
from fastppt.mini import build_mini
from fastppt.objectives.denoising import denoising_losses
from fastppt.training.batch import Draws, draw, make_batch
from fastppt.training.build import build_trainables
from fastppt.training.encoding import encode
from fastppt.training.engine import prepare_engine
from fastppt.training.loop import resolve
from fastppt.training.metric_names import metric_names
from fastppt.training.ring import MetricRing
from fastppt.training.run import new_generator
from fastppt.training.runners import make_runner
from fastppt.training.stage import build_steps, learning_rates
from fastppt.training.step import accumulate_gradients

MODELS = (*MINI_MODELS, *FULL_MODELS)

Settings = dict[str, object]
# What a step notes of itself, by name.
Notes = dict[str, float]

APT: Settings = {
    "stage.0.objectives.denoising.weighting": "adaptive",
    "stage.0.objectives.feature_alignment.weight": 30.0,
    "stage.0.objectives.attention_alignment.weight": 3e-4,
    # How many there are is nothing to a step, and encoding them takes time.
    "photos.views": 1,
}
# What our trainer is run with: a recipe, and settings over it. "apt" is plain LoRA with APT's
# objectives; "apt-recipe" is the method whole, text encoders and learned word included, and
# "apt-base" the same trainables without its objectives.
RECIPES: dict[str, tuple[str, Settings]] = {
    "lora": ("lora", {}),
    "ppt-lora": ("ppt-lora", {}),
    "apt": ("lora", APT),
    "apt-base": ("apt-base", {}),
    "apt-recipe": ("apt", {"photos.views": 1}),
}
# diffusers' step, and what the peer is then told.
PEERS: dict[str, dict[str, bool]] = {
    "diffusers-style": {},
    "diffusers-style, latents cached": {"cached": True},
    "diffusers-style, prior preservation": {"prior": True},
}
# The network without adapters: forward and the backward that every trainer needs; forward alone.
NETWORK, BASE_PASS = "network alone", "base pass alone"

# Steps of which engines are compared with eager ones.
CHECKED_STEPS = 3
# Size of the up-projections where gradients are compared: those of new adapters are zero.
CHECKED_UP = 0.02


@dataclass(frozen=True)
class Work:
    """What is trained, whatever takes the step.

    Attributes:
        model: One of `MODELS`.
        batch_size: Photos in a step.
        resolution: Their side in pixels; None for the model's own.
        rank: Of the adapters.
    """

    model: str
    batch_size: int = 1
    resolution: int | None = None
    rank: int = 32


@dataclass(frozen=True)
class Source:
    """A pretrained model that every way takes a copy of, and photos.

    Attributes:
        pipeline: Never trained itself.
        photos: Folder with photos.
    """

    work: Work
    pipeline: Any
    photos: Path
    device: torch.device
    dtype: torch.dtype

    def make_family(self) -> Family:
        """Return a copy of the model as our trainer holds it."""
        model = self.work.model
        name = MINI_MODELS[model] if model in MINI_MODELS else FAMILY_OF[model]
        config = ModelConfig(path=model, device=str(self.device))
        return make_family(name, copy.deepcopy(self.pipeline), config, self.device, self.dtype)


def open_source(work: Work, device: str, photos: Path, dtype: torch.dtype | None = None) -> Source:
    """Build the model.

    Args:
        work: Which model.
        device: "cpu" or "cuda".
        photos: Folder with photos.
        dtype: Of the network; None for the trainer's default there.
    """
    if dtype is None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if work.model in MINI_MODELS:
        pipeline = build_mini(work.model)
    else:
        pipeline = build_pipeline(work.model, device, dtype)
    return Source(work, pipeline, photos, torch.device(device), dtype)


def moves_text(recipe: str) -> bool:
    """Say whether text encoders or a word's embedding learn in one of `RECIPES`."""
    (stage,) = build_config(RECIPES[recipe][0]).stage
    return stage.trainables.move_text


def rank_settings(recipe: str, rank: int) -> dict[str, object]:
    """Return the settings that give every LoRA of a recipe's first stage a rank."""
    trainables = load_recipe(recipe)[1]["stage"][0]["trainables"]
    names = [name for name in ("lora", "text_encoder_lora") if name in trainables]
    return {f"stage.0.trainables.{name}.rank": rank for name in names}


class TrainerStep:
    """Our trainer's step, made as a run makes it.

    Args:
        source: Model and photos.
        recipe: One of `RECIPES`.
        engine: One of the configuration's engines.
        changes: Settings over all of that.
    """

    def __init__(
        self, source: Source, recipe: str, engine: str, changes: Settings | None = None
    ) -> None:
        work, (name, settings) = source.work, RECIPES[recipe]
        config = build_config(
            name,
            settings=list(
                {
                    "model.path": work.model,
                    "model.device": str(source.device),
                    "photos.folder": str(source.photos),
                    "photos.resolution": work.resolution,
                    "prompts.class_noun": "robot",
                    "output": tempfile.gettempdir(),
                    "engine": engine,
                    "samples.enabled": False,
                    "stage.0.batch_size": work.batch_size,
                    **rank_settings(name, work.rank),
                    **settings,
                    **(changes or {}),
                }.items()
            ),
        )
        self.family = source.make_family()
        self.config: RunConfig = resolve(config, self.family)
        (self.stage,) = self.config.stage
        precise = torch.promote_types(source.dtype, torch.float32)
        self.trainables = build_trainables(self.config, self.family, precise)
        prepare_engine(self.config.engine, self.config.compile_scope, self.family)
        photos = find_photos(source.photos)
        buckets, _ = encode(self.config, self.family, photos, Console(quiet=True))
        names = metric_names(self.config.stage)
        self.ring = MetricRing(names, CHECKED_STEPS, self.family.device)
        generator = new_generator(self.config, self.family)
        (self.step,) = steps = build_steps(
            self.config, self.stage, self.family, self.trainables, buckets, self.ring, generator
        )
        self.runner = make_runner(self.config.engine, steps)
        self.number = 0
        for part, rate in learning_rates(self.stage).items():
            self.step.learning_rates[part].fill_(rate)

    def prepare(self) -> None:
        """Capture the step, where the engine does."""
        self.runner.prepare(0, self.number)

    def __call__(self) -> None:
        """Take one step."""
        self.runner.run(0, self.number)
        self.number += 1

    def first_notes(self) -> list[Notes]:
        """Go on to the end of the first steps, and return what they noted."""
        for _ in range(CHECKED_STEPS - self.number):
            self()
        self.ring.start_read(0, CHECKED_STEPS)
        return self.ring.finish_read()

    def draw(self) -> Draws:
        """Return what the next pass will draw."""
        state = self.step.generator.get_state()
        draws = draw(self.step)
        self.step.generator.set_state(state)
        return draws

    def set_ups(self, size: float) -> None:
        """Draw the up-projections, normally distributed, from a seed."""
        generator = torch.Generator().manual_seed(0)
        for pair in self.trainables.lora.pairs:
            pair.up.copy_(size * torch.randn(pair.up.shape, generator=generator))
        self.trainables.lora.refresh()

    def gradients(self) -> tuple[Tensor, list[Tensor]]:
        """Return a pass's loss, and the gradients of the network's adapters; leaves none.

        Those are of each pair's down and up.
        """
        accumulate_gradients(self.step)
        loss, grad = self.step.losses[0].clone(), self.trainables.lora.arena.grad
        flat = grad.clone()
        self.step.optimizer.zero_grad(set_to_none=False)
        self.step.losses.zero_()
        found = [
            flat.as_strided(part.shape, part.stride(), part.storage_offset())
            for pair in self.trainables.lora.pairs
            for part in (pair.down, pair.up)
        ]
        return loss, found

    def subject(self, source: Source, family: Family) -> Subject:
        """Return what a peer is given, of a fresh family: the same pictures and prompts."""
        assert self.config.photos.resolution is not None
        side = self.config.photos.resolution
        photos = find_photos(source.photos)
        crops = [crop_photo(photo, (side, side)) for photo in photos]
        texts = [subject_prompt(self.config.prompts), class_prompt(self.config.prompts)]
        pipeline = family._pipeline
        tokenizer = pipeline.tokenizer
        ids = tokenizer(
            texts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return Subject(
            family=family.name,
            pipeline=pipeline,
            device=source.device,
            dtype=source.dtype,
            pixels=torch.stack([crop.pixels for crop in crops]),
            sizes=[(*photo.size, *crop.crop) for photo, crop in zip(photos, crops, strict=True)],
            embeddings=family.encode_prompts(texts),
            token_ids=ids.to(source.device),
        )


def compare_notes(found: Sequence[Notes], wanted: Sequence[Notes]) -> dict[str, float]:
    """Return the largest relative difference in the steps' losses, and in their gradient norms.

    NaN where one of them is.
    """
    pairs = list(zip(found, wanted, strict=True))
    worst = {}
    for name in ("loss", "grad_norm"):
        errors = [abs(one[name] / other[name] - 1) for one, other in pairs]
        # max() would drop a NaN that is not first.
        worst[name] = math.nan if any(map(math.isnan, errors)) else max(errors)
    return worst


def make_peer(source: Source, ours: TrainerStep, **options: bool) -> DiffusersStep:
    """Return diffusers' step on a network of its own, its adapters those of ours as they are."""
    family, pairs = source.make_family(), ours.trainables.lora.pairs
    subject = ours.subject(source, family)
    add_adapters(family.network, source.work.rank, [pair.name for pair in pairs])
    peer = DiffusersStep(subject, family.network, ours.stage.batch_size, **options)
    peer.load(pairs)
    return peer


def check_peer(peer: DiffusersStep, ours: TrainerStep) -> dict[str, float]:
    """Return how far the peer's loss and gradients are from ours, as parts of ours.

    Both get the same draws and the same adapters, whose up-projections are not zero here, so that
    all of them count. Ours knows neither the class half of prior preservation, which is therefore
    given the subject's half again, nor preconditioned outputs. Afterwards the adapters are new.
    """
    ours.set_ups(CHECKED_UP)
    peer.load(ours.trainables.lora.pairs)
    kept = peer.precondition, peer.rows
    peer.precondition, peer.rows = False, [0 for _ in peer.rows]
    draws, times = ours.draw(), len(peer.rows)
    wanted_loss, wanted = ours.gradients()
    loss = peer.loss(draws.photos.tolist() * times, _repeat(draws, times))
    loss.backward()
    found = peer.gradients(ours.trainables.lora.pairs)
    errors = {
        "loss": abs(float(loss.detach()) / times / float(wanted_loss) - 1),
        "gradients": _distance(found, wanted, times),
    }
    peer.optimizer.zero_grad()
    peer.precondition, peer.rows = kept
    ours.set_ups(0.0)
    peer.load(ours.trainables.lora.pairs)
    return errors


def _distance(found: Sequence[Tensor], wanted: Sequence[Tensor], factor: float) -> float:
    """Return ||found / factor - wanted|| / ||wanted|| over all tensors together."""
    pairs = zip(found, wanted, strict=True)
    apart = sum(float((f.double() / factor - w.double()).square().sum()) for f, w in pairs)
    return (apart / sum(float(w.double().square().sum()) for w in wanted)) ** 0.5


def _repeat(draws: Draws, times: int) -> Draws:
    tensors = {name: torch.cat([tensor] * times) for name, tensor in vars(draws).items()}
    return Draws(**tensors)


class NetworkAlone:
    """The stock network on one step's inputs, without adapters, with or without a backward pass.

    The backward pass goes from the loss to the input of the first attention and no further, for
    there the first adapter is: what no trainer of these adapters can do without. No weight has a
    gradient.

    Args:
        family: Fresh, or that of another of these.
        step: Whose latents, noise and prompts it sees.
        backward: Go back, too.
    """

    def __init__(self, family: Family, step: TrainerStep, *, backward: bool) -> None:
        self.family, self.backward = family, backward
        draws = step.draw()
        self.batch = make_batch(step.step, draws)
        with torch.no_grad():
            self.prompts = step.step.prompts.subject(draws.photos)
        modules = self.family.network.modules()
        self.first = next(module for module in modules if isinstance(module, Attention))

    def __call__(self) -> Tensor:
        """Run it once; returns the loss."""
        if not self.backward:
            with torch.no_grad():
                return self._loss()
        hook = self.first.register_forward_pre_hook(_start_graph, with_kwargs=True)
        loss = self._loss()
        hook.remove()
        loss.backward()
        return loss.detach()

    def _loss(self) -> Tensor:
        batch = self.batch
        inputs = batch.noisy, batch.timesteps, self.prompts, batch.sizes
        return denoising_losses(self.family.predict(*inputs), batch.target).mean()


def _start_graph(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_()
