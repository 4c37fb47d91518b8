"""What a run is predicted to take of its device's memory.

The run is rehearsed on the meta device, where tensors have shapes and no memory: prompts and a
photo are encoded, the base pass, the tuned pass and the backward pass of each stage are taken by
the code that trains, a picture is decoded; and the bytes of the tensors that are alive are counted.
So a prediction knows of every objective and option. It does not know what libraries take for
themselves (CUDA's context, workspaces of cuBLAS and cuDNN, scratch of kernels), nor what the
allocator cannot hand out again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastppt.config import RunConfig
from fastppt.data.buckets import Bucket
from fastppt.data.latents import LatentBank
from fastppt.data.photos import CroppedPhoto, Photo, find_photos
from fastppt.data.prompt_checks import check_prompts
from fastppt.data.prompts import encode_prompt_bank, quiet_truncation
from fastppt.families.backends import OutlinedAttention
from fastppt.families.base import Family, PromptEmbeddings
from fastppt.families.loading import resolve_resolution
from fastppt.stage_config import StageConfig
from fastppt.trainables.trainables import Trainables
from fastppt.training.build import build_trainables
from fastppt.training.encoding import make_sheet
from fastppt.training.live_bytes import LiveBytes
from fastppt.training.metric_names import metric_names
from fastppt.training.ring import MetricRing
from fastppt.training.stage import build_steps
from fastppt.training.step import Step, accumulate_gradients

ASSUMED_PHOTOS = 5
"""How many a run without a folder is taken to have: the methods are made for 4 to 6."""
GUIDED_ROWS = 2
"""Rows of a pass of the sampler: guidance compares two prompts."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a run is predicted to take on its device.

    Of several stages, the one that takes most.

    Attributes:
        lasting: What stays where it is while steps run, by what it is.
        kept: What the tuned pass keeps for its backward pass.
        remembered: What the base pass leaves for the tuned pass: its prediction, maps, statistics.
        peaks: The most at a time, in each phase: `encode`, `train`, `samples`.
        trainables: What the run trains, without memory.
    """

    lasting: dict[str, int]
    kept: int
    remembered: int
    peaks: dict[str, int]
    trainables: Trainables

    @property
    def peak(self) -> int:
        """The most at a time in the whole run."""
        return max(self.peaks.values())


def plan_memory(config: RunConfig, family: Family) -> MemoryPlan:
    """Predict what a run takes of its device's memory; takes seconds for the largest models.

    Args:
        config: Of the run; its model may be anywhere, its engine is not auto. Without a folder of
            photos there are `ASSUMED_PHOTOS`; buckets are counted as one square.
        family: Its model from `outline_family`, not used before. It gets adapters.

    Raises:
        UserError: what would stop the run: a resolution, a target, a layer that does not exist,
            prompts that `check_prompts` refuses.
    """
    assert family.device.type == "meta"
    rehearsal = _Rehearsal(_with_kept_anchors(config), family)
    encode_peak = rehearsal.encode()
    stages = [rehearsal.train(stage) for stage in rehearsal.config.stage]
    lasting, kept, remembered, train_peak = max(stages, key=lambda stage: stage[-1])
    peaks = {"encode": encode_peak, "train": train_peak}
    if config.samples.enabled:
        held = sum(lasting.values())
        if "graph" in config.engine:
            # What a captured step works in stays its own.
            held = train_peak
        peaks["samples"] = held + rehearsal.sample()
    return MemoryPlan(lasting, kept, remembered, peaks, rehearsal.trainables)


def _with_kept_anchors(config: RunConfig) -> RunConfig:
    """Say of new adapters what a run finds out: that B A is zero at their start."""
    lora = config.stage[0].trainables.lora
    anchor = config.stage[0].objectives.anchor
    if lora is None or lora.init is not None or anchor is None or anchor.form != "effective":
        return config
    first = config.stage[0]
    objectives = first.objectives.model_copy(
        update={"anchor": anchor.model_copy(update={"to": "zero"})}
    )
    stage = first.model_copy(update={"objectives": objectives})
    return config.model_copy(update={"stage": [stage, *config.stage[1:]]})


class _Rehearsal:
    """A run on the meta device, its phases in their order."""

    def __init__(self, config: RunConfig, family: Family) -> None:
        self.config, self.family = config, family
        self.resolution = resolve_resolution(config.photos.resolution, family)
        self.counter = LiveBytes(family.device)
        self.weights = family.weight_bytes()
        self.trainables = build_trainables(config, family)
        if config.gradient_checkpointing:
            family.checkpoint_blocks()
        self.held = self.weights["network"] + sum(_arena_bytes(self.trainables).values())

    def encode(self) -> int:
        """Encode prompts and a photo; returns the most bytes at a time."""
        config, family, side = self.config, self.family, self.resolution
        photos = _photos(config, side)
        check_prompts(config, family, photos)
        pixels = torch.empty(3, side, side, device=family.device)
        crops = [CroppedPhoto(pixels, (0, 0))] * len(photos)
        views = config.photos.views if config.augment else 0
        with self.counter, quiet_truncation():
            before = self.counter.live
            mean, _ = family.encode_photos(pixels[None])
            self.encoding_work = self.counter.peak - before
            posteriors = mean.new_empty(len(photos), 1 + views, 2, *mean.shape[1:])
            prompts = encode_prompt_bank(
                family, config.prompts, photos, crops, move_text=config.move_text
            )
            self.bucket = Bucket(
                size=(side, side),
                photos=dict(enumerate(photos)),
                latents=LatentBank(posteriors),
                prompts=prompts,
            )
            self.sheet = make_sheet(config, family)
            del mean
        others = sum(self.weights.values()) - self.weights["network"]
        family.release_encoders(keep_vae=True, keep_text=config.move_text)
        return self.held + others + self.counter.peak

    def train(self, stage: StageConfig) -> tuple[dict[str, int], int, int, int]:
        """Rehearse a step; returns what lasts, is kept, is remembered, and the most at a time."""
        config, family, counter = self.config, self.family, self.counter
        marks: list[int] = []

        def mark(*_: object) -> None:
            marks.append(counter.live)

        network = family.network
        hooks = network.register_forward_pre_hook(mark), network.register_forward_hook(mark)
        with counter:
            ring = MetricRing(
                metric_names(config.stage),
                min(config.log_every, sum(stage.steps for stage in config.stage)),
                family.device,
            )
            (step,) = build_steps(
                config, stage, family, self.trainables, [self.bucket], ring, torch.Generator()
            )
            before = counter.peak = counter.live
            with counter.kept_for_backward(), OutlinedAttention():
                accumulate_gradients(step)
        for hook in hooks:
            hook.remove()
        lasting = self._lasting(step, before)
        # The base pass is the first.
        remembered = marks[1] - marks[0] if stage.objectives.need_base else 0
        return lasting, counter.kept, remembered, sum(lasting.values()) + counter.peak - before

    def sample(self) -> int:
        """Draw a picture; returns the bytes that it takes on top of what lasts."""
        family, counter = self.family, self.counter
        shape = (GUIDED_ROWS, *self.bucket.latents.latent_shape)
        rows = torch.zeros(GUIDED_ROWS, dtype=torch.int64, device=family.device)
        prompts = self.bucket.prompts
        with counter, torch.no_grad():
            before = counter.peak = counter.live
            latents = torch.empty(shape, device=family.device, dtype=family.dtype)
            family.predict(latents, rows, prompts.subject(rows), prompts.sizes[rows])
            family.decode_latents(latents[:1])
        vae = 0 if self.config.photos.refresh_every else self.weights["VAE"]
        return vae + counter.peak - before

    def _lasting(self, step: Step, counted: int) -> dict[str, int]:
        """Name all that stays while steps run; ``counted`` is what the counter saw of it."""
        states = list(step.optimizer.state.values())
        seen = {
            "moments": sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in states),
            "anchors": sum(s["anchor"].nbytes for s in states if "anchor" in s),
            "latents": self.bucket.latents.num_bytes,
            "prompts": self._all_prompt_bytes(),
        }
        lasting = {"network": self.weights["network"], **_arena_bytes(self.trainables), **seen}
        if self.config.move_text:
            lasting["text encoders"] = self.family.weight_bytes()["text encoders"]
        lasting["tables and metrics"] = counted - sum(seen.values())
        if self.config.photos.refresh_every:
            latents = self.bucket.latents
            staging = latents.num_bytes // latents.num_photos
            lasting["VAE at work"] = self.weights["VAE"] + self.encoding_work + staging
        return lasting

    def _all_prompt_bytes(self) -> int:
        """Return the bytes of the prompts, encoded ones and those to be encoded."""
        bank, sheet = self.bucket.prompts, self.sheet
        live = [each for each in (bank.live, *(sheet.live or ())) if each is not None]
        ids: int = sum(tensor.nbytes for each in live for tensor in each.ids.tensors)
        return ids + _prompt_bytes([bank.embeddings, sheet.prompts, sheet.negative])


def _arena_bytes(trainables: Trainables) -> dict[str, int]:
    """Return the bytes of the arenas: what is trained, and what a narrower network reads."""
    arenas = trainables.arenas.values()
    copies = [arena.working_copy for arena in arenas if arena.working_copy is not None]
    return {
        "adapters": sum(arena.flat.nbytes for arena in arenas),
        "gradients": sum(arena.grad.nbytes for arena in arenas),
        "working copy": sum(copy.nbytes for copy in copies),
    }


def _prompt_bytes(embeddings: Sequence[PromptEmbeddings]) -> int:
    tensors = [t for each in embeddings for t in (each.tokens, each.pooled) if t is not None]
    return sum(tensor.nbytes for tensor in tensors)


def _photos(config: RunConfig, side: int) -> list[Photo]:
    """Return the run's photos; where no folder is given, as many as a run has."""
    if config.photos.folder is not None:
        return find_photos(config.photos.folder, config.photos.captions)
    return [Photo(Path(f"{n}.jpg"), None, None, (side, side)) for n in range(ASSUMED_PHOTOS)]
