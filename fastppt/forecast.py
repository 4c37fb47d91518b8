"""What a run is predicted to take of memory and disk, as findings.

Nothing that can be missing or broken is imported at the top.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.machine import Finding, free_host_memory, nearest_folder, size_in_words

if TYPE_CHECKING:
    import torch


def memory(config: RunConfig, device: torch.device, dtype: torch.dtype) -> list[Finding]:
    """Return what the run is predicted to take of its device's memory and disk, and if it fits.

    Args:
        config: Its model has no problem.
        device: Where it would train.
        dtype: Of the network and the text encoders.
    """
    from fastppt.families.loading import outline_family, resolve_resolution
    from fastppt.outputs.disk import check_disk, count_weights, plan_disk
    from fastppt.outputs.folder import RunFolder
    from fastppt.training.engine import resolve_engine
    from fastppt.training.memory import ASSUMED_PHOTOS, plan_memory
    from fastppt.training.stage import noted_names

    engine = resolve_engine(config.engine, device)
    on_device = config.model.model_copy(update={"device": str(device)})
    planned = config.model_copy(update={"engine": engine, "model": on_device})
    try:
        family = outline_family(config.model, dtype)
        if family is None:
            text = "the model's configuration is not on this machine; it is with the model's folder"
            return [Finding("note", "not predicted", text)]
        weights = count_weights(family)
        plan = plan_memory(planned, family)
    except UserError as error:
        return [Finding("problem", "run", str(error))]
    sizes = {what: size for what, size in plan.lasting.items() if size}
    parts = ", ".join(f"{what} {size_in_words(size)}" for what, size in sizes.items())
    kept = f"{size_in_words(plan.kept)} kept from the tuned pass to its backward pass"
    if plan.remembered:
        kept += f", {size_in_words(plan.remembered)} from the base pass to the tuned pass"
    found = [
        Finding("ok", "always there", f"{size_in_words(sum(sizes.values()))}: {parts}"),
        Finding("ok", "in a step", kept),
        *(Finding("ok", f"at most, {phase}", size_in_words(n)) for phase, n in plan.peaks.items()),
    ]
    if plan.host:
        text = f"{size_in_words(plan.host)} of anchors; {size_in_words(free_host_memory())} free"
        fits = plan.host <= free_host_memory()
        found.append(Finding("ok" if fits else "problem", "in host memory", text))
    if config.photos.folder is None:
        found.append(Finding("note", "photos", f"not given: {ASSUMED_PHOTOS} are assumed"))
    if device.type == "cuda":
        import torch

        free, place = torch.cuda.mem_get_info(device)[0], "on the GPU"
    else:
        free, place = free_host_memory(), "on this machine"
    text = f"{size_in_words(plan.peak)} at most, without what libraries take for themselves; "
    fits = plan.peak <= free
    text = f"{'it fits' if fits else 'it does not fit'}: {text}{size_in_words(free)} free {place}"
    found.append(Finding("ok" if fits else "problem", "run", text))
    resolution = resolve_resolution(config.photos.resolution, family)
    columns = noted_names(config, family)
    needed = plan_disk(config, weights, plan.trainables, resolution, columns)
    found += _class_images(config, resolution)
    config = config.model_copy(update={"output": config.output or Path.cwd() / "out"})
    assert config.output is not None
    folder = RunFolder(config.output)
    text = f"the run writes up to {needed}"
    return [*found, checked("disk", text, lambda: check_disk(needed, folder, config))]


def checked(what: str, text: str, check: Callable[[], object]) -> Finding:
    """Return a finding of this text, or of what a check refuses."""
    try:
        check()
    except UserError as error:
        return Finding("problem", what, str(error))
    return Finding("ok", what, text)


def _class_images(config: RunConfig, resolution: int) -> list[Finding]:
    """Return where class images are kept that the run draws, as if PNG could not compress them."""
    from fastppt.training.class_images import default_cache

    found = []
    for stage in config.stage:
        prior = stage.objectives.prior_preservation
        if prior is None or prior.folder is not None:
            continue
        place = prior.cache or default_cache()
        size = size_in_words(prior.num_images * 3 * resolution**2)
        free = size_in_words(shutil.disk_usage(nearest_folder(place)).free)
        text = f"{prior.num_images} in {place}, up to {size}, unless they are there; {free} free"
        found.append(Finding("ok", "class images", text))
    return found
