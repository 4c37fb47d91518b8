"""What a run is predicted to take of its device's memory.

The run is rehearsed on the meta device, where tensors have shapes and no memory: a class image is
drawn, prompts and a photo are encoded, the base pass, the tuned pass and the backward pass of each
stage are taken by the code that trains, a picture is decoded; and the bytes of the tensors that are
alive are counted. So a prediction knows of every objective, trainable and option. It does not know
what libraries take for themselves (CUDA's context, workspaces of cuBLAS and cuDNN, scratch of
kernels), nor what the allocator cannot hand out again.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.data.buckets import Bucket
from fastppt.data.class_images import class_prompt_bank
from fastppt.data.latents import LatentBank
from fastppt.data.photos import CroppedPhoto, Photo, find_photos
from fastppt.data.prompt_checks import check_prompts
from fastppt.data.prompts import PromptBank, class_prompt, encode_prompt_bank, quiet_truncation
from fastppt.families.backends import OutlinedAttention
from fastppt.families.base import Family, PromptEmbeddings
from fastppt.families.loading import resolve_resolution
from fastppt.stage_config import PriorPreservationConfig
from fastppt.trainables.network_weights import NetworkWeights
from fastppt.trainables.svdiff import SpectralShifts
from fastppt.trainables.trainables import Trainables
from fastppt.training.build import build_trainables
from fastppt.training.class_images import resolve_prior
from fastppt.training.encoding import make_sheet
from fastppt.training.live_bytes import LiveBytes
from fastppt.training.metric_names import metric_names
from fastppt.training.ring import MetricRing
from fastppt.training.sampler import DECODED_PIXELS, Sampler
from fastppt.training.stage import build_steps
from fastppt.training.step import Step, accumulate_gradients
from fastppt_kernels.anchored_adamw.staging import BUFFER_BYTES, NUM_BUFFERS

ASSUMED_PHOTOS = 5
"""How many a run without a folder is taken to have: the methods are made for 4 to 6."""
GUIDED_ROWS = 2
"""Rows of a pass of the sampler: guidance compares two prompts."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a run is predicted to take on its device.

    Of several stages, the one that takes most.

    Attributes:
        lasting: What stays where it is while steps run, by what it is. Of a network whose own
            weights are trained, `network` is the part that is not.
        host: What stays in the host's memory for the steps, where that is another: anchors.
        kept: What the tuned pass keeps for its backward pass.
        remembered: What the base pass leaves for the tuned pass: its prediction, maps, statistics.
        peaks: The most at a time, in each phase: `class images`, `encode`, `train`, `samples`.
        trainables: What the run trains, without memory.
    """

    lasting: dict[str, int]
    host: int
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
        config: Of the run; its model may be anywhere, its engine and device are not auto. Without a
            folder of photos there are `ASSUMED_PHOTOS`; buckets are counted as one square. Class
            images are counted as if none were there yet.
        family: Its model from `outline_family`, not used before. It gets adapters.

    Raises:
        UserError: what would stop the run: a resolution, a target, a layer that does not exist,
            prompts that `check_prompts` refuses.
    """
    assert family.device.type == "meta"
    # Of a CPU, the host's memory is the device's.
    is_streamed = config.kept_weights == "host" and config.model.device != "cpu"
    rehearsal = _Rehearsal(_with_kept_anchors(config), family, is_streamed)
    peaks = rehearsal.draw_class_images() | {"encode": rehearsal.encode()}
    stages = [rehearsal.train(index) for index in range(len(config.stage))]
    lasting, kept, remembered, peaks["train"] = max(stages, key=lambda stage: stage[-1])
    if config.samples.enabled:
        # What a captured step works in stays its own.
        is_captured = "graph" in config.engine
        held = peaks["train"] if is_captured else sum(lasting.values())
        peaks["samples"] = held + rehearsal.sample()
    return MemoryPlan(lasting, rehearsal.host, kept, remembered, peaks, rehearsal.trainables)


def _with_kept_anchors(config: RunConfig) -> RunConfig:
    """Say of anchors what the meta device cannot.

    It finds out of no value that it is zero: what new adapters add is, at their start, and new
    shifts and rotations are. And it has no host memory to stream from.
    """
    stages = []
    for index, stage in enumerate(config.stage):
        anchor, lora = stage.objectives.anchor, stage.trainables.lora
        if anchor is not None:
            is_new = lora is not None and lora.init is None and anchor.form == "effective"
            shifts = stage.trainables.svdiff or stage.trainables.oft
            is_zero = index == 0 and (is_new or shifts is not None)
            said = {"storage": "device"} | ({"to": "zero"} if is_zero else {})
            update = {"anchor": anchor.model_copy(update=said)}
            objectives = stage.objectives.model_copy(update=update)
            stage = stage.model_copy(update={"objectives": objectives})
        stages.append(stage)
    return config.model_copy(update={"stage": stages})


class _Rehearsal:
    """A run on the meta device, its phases in their order."""

    def __init__(self, config: RunConfig, family: Family, is_streamed: bool) -> None:
        self.config, self.family = config, family
        self.resolution = resolve_resolution(config.photos.resolution, family)
        self.counter = LiveBytes(family.device)
        self.weights = family.weight_bytes()
        self.trainables = build_trainables(config, family)
        if config.gradient_checkpointing:
            family.checkpoint_blocks()
        self.is_streamed = is_streamed
        held = {**_trained(self.trainables), "network": _tensors_of(family.network)}
        self.host = 0
        if self.is_streamed:
            self.host = sum(_sizes({"anchors": held.pop("anchors")}).values())
        self.held = sum(_sizes(held).values())
        self.class_sets: dict[int, Bucket] = {}

    @property
    def encoders(self) -> int:
        """Bytes of all weights but the network's."""
        return sum(self.weights.values()) - self.weights["network"]

    def draw_class_images(self) -> dict[str, int]:
        """Draw a batch of the class images of each stage, and bank as many as it wants.

        Returns:
            The most bytes at a time in the phase, by its name; empty where no stage has any.
        """
        sets: dict[PriorPreservationConfig, Bucket] = {}
        peaks = []
        for index, stage in enumerate(self.config.stage):
            prior = stage.objectives.prior_preservation
            if prior is None:
                continue
            key = f"stage.{index}.objectives.prior_preservation"
            prior = resolve_prior(prior.model_copy(update={"weight": 1.0}), self.family, key)
            if prior not in sets:
                if prior.folder is None:
                    peaks.append(self._draw_class_image(prior))
                sets[prior] = self._bank_class_images(prior.num_images)
            self.class_sets[index] = sets[prior]
        work = max(peaks, default=0)
        return {"class images": self.held + self.encoders + work} if peaks else {}

    def _draw_class_image(self, prior: PriorPreservationConfig) -> int:
        """Take a step of the sampler and decode; returns the most bytes beside the weights."""
        config, family, counter = self.config, self.family, self.counter
        side = self.resolution
        assert prior.sampler is not None and prior.steps is not None
        assert prior.guidance_scale is not None
        with counter, quiet_truncation(), OutlinedAttention():
            before = counter.peak = counter.live
            sampler = Sampler(
                family,
                self.trainables,
                family.encode_prompts([class_prompt(config.prompts)]),
                family.encode_negative(),
                size=(side, side),
                table=family.sampler_table(prior.sampler, prior.steps),
                guidance_scale=prior.guidance_scale,
                batch_size=prior.batch_size,
                recorder=None,
            )
            sampler.take_step()
            family.decode_latents(sampler.latents[: max(1, DECODED_PIXELS // side**2)])
        return counter.peak - before

    def _bank_class_images(self, num_images: int) -> Bucket:
        family, side = self.family, self.resolution
        pictures = _outlined_photos(num_images, side)
        with self.counter, quiet_truncation():
            pixels = torch.empty(1, 3, side, side, device=family.device)
            mean, _ = family.encode_photos(pixels)
            bank = LatentBank(mean.new_empty(num_images, 1, 2, *mean.shape[1:]))
            prompts = class_prompt_bank(
                family,
                self.config.prompts,
                pictures,
                (side, side),
                move_text=self.config.move_text,
            )
        return Bucket((side, side), dict(enumerate(pictures)), bank, prompts)

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
        family.release_encoders(keep_vae=True, keep_text=config.move_text)
        return self.held + self.encoders + self.counter.peak

    def train(self, index: int) -> tuple[dict[str, int], int, int, int]:
        """Rehearse a step of a stage.

        Returns:
            What lasts, is kept, is remembered, and the most at a time.
        """
        config, family, counter = self.config, self.family, self.counter
        stage = config.stage[index]
        # What an earlier stage had.
        gc.collect()
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
                config,
                stage,
                family,
                self.trainables,
                [self.bucket],
                ring,
                torch.Generator(),
                self.class_sets.get(index),
                torch.Generator(),
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
        states = [dict(state) for state in step.optimizer.state.values()]
        anchors = [state.pop("anchor") for state in states if "anchor" in state]
        trained = _trained(self.trainables)
        banks = [step.latents, *([] if step.class_latents is None else [step.class_latents])]
        average = step.average
        parts: dict[str, Iterable[Tensor]] = {
            **trained,
            "network": _tensors_of(self.family.network),
            "moments": [t for state in states for name, t in state.items() if name != "step"],
            "anchors": [*trained["anchors"], *anchors],
            "averages": [] if average is None else [*average.averages.values()],
            "latents": [bank.posteriors for bank in banks],
            "prompts": self._prompt_tensors(step),
        }
        lasting = _sizes(parts)
        if self.config.move_text:
            lasting["text encoders"] = self.family.weight_bytes()["text encoders"]
        every = [tensor for part in parts.values() for tensor in part]
        lasting["tables and metrics"] = counted - self.counter.bytes_of(every)
        if self.is_streamed:
            lasting["anchors"] = 0
            lasting["anchor buffers"] = NUM_BUFFERS * min(BUFFER_BYTES, self.host)
        if self.config.photos.refresh_every:
            latents = self.bucket.latents
            staging = latents.num_bytes // latents.num_photos
            lasting["VAE at work"] = self.weights["VAE"] + self.encoding_work + staging
        return lasting

    def _prompt_tensors(self, step: Step) -> list[Tensor]:
        """Return the prompts, encoded ones and those to be encoded."""
        banks: list[PromptBank] = [self.bucket.prompts, step.prompts]
        banks += [] if step.class_prompts is None else [step.class_prompts]
        encoded = [bank.embeddings for bank in banks] + [self.sheet.prompts, self.sheet.negative]
        encoded += [bank.moved for bank in banks if bank.moved is not None]
        live = [each for bank in banks if (each := bank.live) is not None]
        live += [each for each in self.sheet.live or () if each is not None]
        ids = [tensor for each in live for tensor in each.ids.tensors]
        return [*ids, *(tensor for each in encoded for tensor in _tensors_in(each))]


def _trained(trainables: Trainables) -> dict[str, list[Tensor]]:
    """Return what the trainables hold on the device, whatever the stage."""
    arenas, network = trainables.arenas.values(), trainables.network
    pretrained = network.pretrained if isinstance(network, NetworkWeights) else None
    return {
        "trained values": [arena.flat for arena in arenas],
        "gradients": [arena.grad for arena in arenas],
        "working copy": [a.working_copy for a in arenas if a.working_copy is not None],
        "singular vectors": network.basis if isinstance(network, SpectralShifts) else [],
        "anchors": [] if pretrained is None else [pretrained],
    }


def _sizes(parts: Mapping[str, Iterable[Tensor]]) -> dict[str, int]:
    """Return the bytes of each part; a storage counts once, in the first part that it is of."""
    seen: set[int] = set()
    sizes = {}
    for name, tensors in parts.items():
        storages = (tensor.untyped_storage() for tensor in tensors)
        places = {storage._cdata: storage.nbytes() for storage in storages}
        sizes[name] = sum(size for place, size in places.items() if place not in seen)
        seen |= places.keys()
    return sizes


def _tensors_of(module: torch.nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _tensors_in(embeddings: PromptEmbeddings) -> list[Tensor]:
    return [t for t in (embeddings.tokens, embeddings.pooled) if t is not None]


def _photos(config: RunConfig, side: int) -> list[Photo]:
    """Return the run's photos; where no folder is given, as many as a run has."""
    if config.photos.folder is not None:
        return find_photos(config.photos.folder, config.photos.captions)
    return _outlined_photos(ASSUMED_PHOTOS, side)


def _outlined_photos(number: int, side: int) -> list[Photo]:
    return [Photo(Path(f"{n}.jpg"), None, None, (side, side)) for n in range(number)]
