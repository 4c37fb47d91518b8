"""The phases of a job for `bench.roofline`: timed as a run takes them, and counted."""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console

from bench.step_parts import PARTS, UPDATE, PartClock, PartMarks, count_parts
from bench.step_ways import Source, TrainerStep
from bench.traffic import Traffic, add_traffic, count_traffic
from fastppt.config import ModelConfig, RunConfig
from fastppt.config_io import build_config
from fastppt.data.photos import find_photos
from fastppt.data.prompts import class_prompt, quiet_truncation
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.stage_config import PriorPreservationConfig
from fastppt.trainables.trainables import Trainables
from fastppt.training.build import build_trainables
from fastppt.training.encoding import encode
from fastppt.training.graph import CudaRecorder
from fastppt.training.loop import resolve
from fastppt.training.sampler import DECODED_PIXELS, Sampler

PRIOR = "stage.0.objectives.prior_preservation"
SAMPLER_BATCH = 4


@dataclass(frozen=True)
class Phase:
    """What a phase took and moved.

    Attributes:
        seconds: Median.
        note: What a reader must know beside it.
    """

    name: str
    seconds: float
    flops: int
    traffic: Traffic
    note: str = ""


def synchronized(device: str) -> float:
    """Return the time when all that was queued is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_preparation(source: Source, path: str, engine: str, sampler_steps: int) -> list[Phase]:
    """Load a model, draw a batch of class images, encode photos and prompts: once, as a run does.

    Args:
        source: The same model; copies of it are counted on.
        path: Its folder, in the machine's memory of files.
        engine: With a captured one the sampler's steps are captured too.
        sampler_steps: Of the class images.
    """
    device = source.device.type
    start = synchronized(device)
    family = load_family(ModelConfig(path=path, device=device))
    seconds = synchronized(device) - start
    weights = sum(family.weight_bytes().values())
    load = Phase(
        "load",
        seconds,
        0,
        Traffic(2 * weights, 2 * weights),
        "once, from the memory of files; bytes of the weights, read and written",
    )
    config = _prior_config(source, path, family, sampler_steps)
    trainables = build_trainables(config, family)
    sampling = _measure_sampling(config, family, trainables, engine)
    return [load, _measure_encoding(config, family, source), sampling]


def _prior_config(source: Source, path: str, family: Family, steps: int) -> RunConfig:
    settings = {
        "model.path": path,
        "model.device": str(source.device),
        "photos.folder": str(source.photos),
        "photos.resolution": source.work.resolution,
        "prompts.class_noun": "robot",
        "output": tempfile.gettempdir(),
        "samples.enabled": False,
        f"{PRIOR}.steps": steps,
        f"{PRIOR}.batch_size": SAMPLER_BATCH,
    }
    return resolve(build_config("lora-prior", settings=list(settings.items())), family)


def _measure_encoding(config: RunConfig, family: Family, source: Source) -> Phase:
    photos, console, device = find_photos(source.photos), Console(quiet=True), family.device.type

    def run(of: Family) -> Callable[[], object]:
        return partial(encode, config, of, photos, console)

    # It gives its text encoders up, so a copy is counted on.
    flops, traffic = count_traffic(run(source.make_family()))
    start = synchronized(device)
    run(family)()
    seconds = synchronized(device) - start
    return Phase("encode", seconds, flops, traffic, f"{len(photos)} photos and all prompts, once")


def _measure_sampling(
    config: RunConfig, family: Family, trainables: Trainables, engine: str
) -> Phase:
    """Draw a batch twice: the first of them captures what is captured."""
    prior = config.stage[0].objectives.prior_preservation
    assert prior is not None and prior.steps is not None
    device = family.device.type
    recorder = CudaRecorder(family.device, []) if engine.startswith("graph") else None
    with closing(_make_sampler(config, family, trainables, prior, recorder)) as sampler:
        seeds = range(sampler.batch_size)
        sampler.draw(seeds)
        start = synchronized(device)
        sampler.draw(seeds)
        seconds = synchronized(device) - start
    with closing(_make_sampler(config, family, trainables, prior, None)) as sampler:
        flops, one = count_traffic(sampler.take_step)
        parts = [(prior.steps * flops, Traffic(prior.steps * one.ops, prior.steps * one.least))]
        for latents in sampler.latents.split(_decoded_at_a_time(config)):
            parts.append(count_traffic(partial(family.decode_latents, latents)))
    note = f"{len(seeds)} pictures, {prior.steps} steps, guidance {prior.guidance_scale:g}"
    total = sum(flops for flops, _ in parts)
    return Phase("class sampling", seconds, total, add_traffic(t for _, t in parts), note)


def _decoded_at_a_time(config: RunConfig) -> int:
    side = config.photos.resolution
    assert side is not None
    return max(1, DECODED_PIXELS // side**2)


def _make_sampler(
    config: RunConfig,
    family: Family,
    trainables: Trainables,
    prior: PriorPreservationConfig,
    recorder: CudaRecorder | None,
) -> Sampler:
    side = config.photos.resolution
    assert side is not None and prior.sampler is not None and prior.steps is not None
    assert prior.guidance_scale is not None
    with quiet_truncation():
        prompt = family.encode_prompts([class_prompt(config.prompts)])
        negative = family.encode_negative()
    return Sampler(
        family,
        trainables,
        prompt,
        negative,
        size=(side, side),
        table=family.sampler_table(prior.sampler, prior.steps),
        guidance_scale=prior.guidance_scale,
        batch_size=prior.batch_size,
        recorder=recorder,
    )


def measure_step(step: TrainerStep, device: str, rounds: int) -> list[Phase]:
    """Time and count the parts of a step that has not been captured yet.

    Args:
        step: Ours.
        device: "cpu" or "cuda".
        rounds: Steps that are timed.
    """
    clock = PartClock(device)
    with PartMarks(step, clock) as marks:
        step.prepare()
        for _ in range(2):
            step()
        times = [clock.time(step) for _ in range(rounds)]
        counts = count_parts(step, marks)
    phases = []
    for name in PARTS:
        flops, traffic = counts[name]
        if name == UPDATE and device == "cuda":
            traffic = add_traffic([traffic, update_traffic(step)])
        seconds = statistics.median(each[name] for each in times)
        phases.append(Phase(name, seconds, flops, traffic))
    return phases


# Reads and writes of an element by the optimizer's kernels, in accesses, and the fewest that any
# way to take the step makes: parameter, gradient and both moments read, all but the gradient
# written, and an anchor that is not zero read. The effective form is one pass over the factors for
# their products, and one that adds to the gradients; then it is as without an anchor.
KERNEL_ACCESSES = {"none": 1 + 4 + 3, "effective": 1 + 3 + 1 + 4 + 3, "raw": 2 + 4 + 3}
LEAST_ACCESSES = 4 + 3


def update_traffic(step: TrainerStep) -> Traffic:
    """Return the bytes of the optimizer's Triton kernels, which no counter of operators sees.

    For the anchors of the recipes of `bench.step_ways`: none, or one whose values are zero.
    """
    ops = least = 0
    for group in step.step.optimizer.param_groups:
        weight = group["anchor_weight"]
        form = "none" if isinstance(weight, float) and weight == 0 else group["form"]
        for param in group["params"]:
            ops += KERNEL_ACCESSES[form] * param.nbytes
            least += LEAST_ACCESSES * param.nbytes
    copies = _copy_bytes(step)
    return Traffic(ops + copies, least + copies)


def _copy_bytes(step: TrainerStep) -> int:
    """Return the bytes of the rounded adapters that the update writes."""
    arenas = step.trainables.arenas.values()
    return sum(a.working_copy.nbytes for a in arenas if a.working_copy is not None)
