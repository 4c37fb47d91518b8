"""The class images of a run: found, or drawn by the base model before the first step."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Set
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.data.class_images import ClassImages, find_class_pictures, read_picture
from fastppt.data.photos import Photo
from fastppt.data.prompts import check_class_prompt, class_prompt, quiet_truncation
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.outputs.image_cache import ImageCache
from fastppt.outputs.lock import wait_for_folder
from fastppt.stage_config import PriorPreservationConfig
from fastppt.trainables.trainables import Trainables
from fastppt.training.graph import Recorder
from fastppt.training.identity import describe_machine, fingerprint, hash_photos
from fastppt.training.progress import class_image_line
from fastppt.training.sampler import Sampler

# Of what `describe_machine` says, what a picture's last bits may depend on.
MACHINE = ("torch", "diffusers", "device")


def resolve_prior(
    prior: PriorPreservationConfig, family: Family, key: str
) -> PriorPreservationConfig:
    """Fill in what depends on the model, as `loop.resolve` does.

    Args:
        prior: A stage's.
        family: The loaded model.
        key: That of the objective, for messages.

    Raises:
        UserError: the model has no such sampler, or it takes no so many steps.
    """
    cache = None if prior.cache is None else prior.cache.absolute()
    if prior.folder is not None:
        return prior.model_copy(update={"folder": prior.folder.absolute(), "cache": cache})
    steps, sampler = prior.steps or family.sampler_steps, prior.sampler or family.sampler
    guidance = prior.guidance_scale
    if guidance is None:
        guidance = family.sampler_guidance
    if steps > family.num_timesteps:
        raise UserError(f"{key}.steps must be <= {family.num_timesteps}, got {steps}")
    try:
        family.sampler_table(sampler, steps)
    except UserError as error:
        raise UserError(f"{key}.{error}") from None
    drawing = {"cache": cache, "steps": steps, "guidance_scale": guidance, "sampler": sampler}
    return prior.model_copy(update=drawing)


def fingerprint_painter(family: Family) -> str:
    """Return a fingerprint of the weights that draw: network and VAE, before anything is put in.

    Text encoders show in what they make of the prompts.
    """
    modules = {"network": family.network, "vae": family.vae}
    return fingerprint(
        [
            (f"{part}.{name}", tensor)
            for part, module in modules.items()
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        ]
    )


def find_class_images(
    config: RunConfig,
    family: Family,
    trainables: Trainables,
    weights: str,
    console: Console,
    recorder: Recorder | None,
) -> dict[int, ClassImages]:
    """Return the class images of each stage that has some; those that are missing are drawn.

    Args:
        config: Resolved.
        family: The loaded model, its encoders and VAE on the device.
        trainables: What is put into it; the base draws.
        weights: What `fingerprint_painter` returned.
        console: Is told of each set, and who is waited for.
        recorder: Who captures the sampler's steps; None runs them op by op.

    Raises:
        UserError: the class prompt says the new word, a folder's pictures that
            `find_class_pictures` refuses, or a cache that cannot be written.
        Interrupted: a signal has come. What is finished stays in the cache.
    """
    sets: dict[PriorPreservationConfig, ClassImages] = {}
    stages: dict[int, ClassImages] = {}
    for index, stage in enumerate(config.stage):
        prior = stage.objectives.prior_preservation
        if prior is None:
            continue
        # The weight is no matter of the pictures.
        asked = prior.model_copy(update={"weight": 1.0})
        if asked not in sets:
            started, key = time.perf_counter(), f"stage.{index}.objectives.prior_preservation"
            if prior.folder is None:
                painter = _Painter(config, family, trainables, weights, prior, recorder)
                pictures, hashes, num_reused = painter.find(console, key)
            else:
                pictures = find_class_pictures(prior.folder, prior.num_images, key)
                hashes, num_reused = hash_photos(pictures), len(pictures)
            seconds = time.perf_counter() - started
            sets[asked] = ClassImages(prior, pictures, hashes, num_reused, seconds)
            _say(console, f"class images: {sets[asked]}")
        stages[index] = sets[asked]
    return stages


def default_cache() -> Path:
    """Return the folder that class images are kept in unless a run says which."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "fastppt" / "class-images"


class _Painter:
    """The base model, asked for the class images of a stage."""

    def __init__(
        self,
        config: RunConfig,
        family: Family,
        trainables: Trainables,
        weights: str,
        prior: PriorPreservationConfig,
        recorder: Recorder | None,
    ) -> None:
        assert config.photos.resolution is not None
        assert prior.sampler is not None and prior.steps is not None
        text = class_prompt(config.prompts)
        check_class_prompt(family, config.prompts, text)
        self._size = config.photos.resolution, config.photos.resolution
        self._family, self._trainables, self._recorder = family, trainables, recorder
        self._prior = prior
        with quiet_truncation(), family.text.base():
            self._prompt, self._negative = family.encode_prompts([text]), family.encode_negative()
        self._table = family.sampler_table(prior.sampler, prior.steps)
        machine = describe_machine(family.device)
        self._request = {
            "prompt": text,
            "size": self._size,
            **prior.model_dump(
                include={"sampler", "steps", "guidance_scale", "batch_size", "seed"}
            ),
            "weights": weights,
            "inputs": self._hash_inputs(),
            "precision": str(family.dtype).removeprefix("torch."),
            "attention": family.model.attention,
            **{name: machine[name] for name in MACHINE},
        }

    def find(self, console: Console, key: str) -> tuple[list[Photo], dict[str, str], int]:
        """Return the pictures, their hashes by name, and how many were there already."""
        cache = ImageCache(self._prior.cache or default_cache(), self._request)
        with ExitStack() as stack:
            try:
                wait = partial(_say, console, "waiting for another run, which draws class images")
                is_held = stack.enter_context(wait_for_folder(cache.folder, wait))
            except OSError as error:
                raise UserError(
                    f"{key}.cache: {cache.folder} cannot be written ({error.strerror or error}); "
                    "choose another folder"
                ) from None
            if is_held:
                cache.delete_leftovers()
            hashes = cache.hashes(self._prior.num_images)
            num_reused = len(hashes)
            if num_reused < self._prior.num_images:
                hashes |= self._draw(cache, hashes.keys(), console)
        pictures = [read_picture(cache.path(number), key) for number in sorted(hashes)]
        return pictures, {cache.path(n).name: hashes[n] for n in sorted(hashes)}, num_reused

    def _draw(self, cache: ImageCache, there: Set[int], console: Console) -> dict[int, str]:
        """Draw what is not there, and return the hashes.

        A batch has the same pictures in it each time, wanted ones or not: then each of them comes
        out the same, bit for bit, where the device computes the same bits every time.
        """
        prior, size = self._prior, self._prior.batch_size
        missing = [number for number in range(prior.num_images) if number not in there]
        assert prior.steps is not None and prior.guidance_scale is not None
        sampler = Sampler(
            self._family,
            self._trainables,
            self._prompt,
            self._negative,
            size=self._size,
            table=self._table,
            guidance_scale=prior.guidance_scale,
            batch_size=size,
            recorder=self._recorder,
        )
        hashes: dict[int, str] = {}
        with (
            closing(sampler),
            class_image_line(console, len(missing), prior.steps) as show,
            # A few pictures do not repay the compilation of the blocks for inference.
            torch.compiler.set_stance("force_eager"),
        ):
            for first in dict.fromkeys(number // size * size for number in missing):
                batch = range(first, first + size)
                drawn = sampler.draw([prior.seed + number for number in batch])
                hashes |= cache.write(
                    {
                        number: Image.fromarray(pixels.numpy())
                        for number, pixels in zip(batch, drawn, strict=True)
                        if number in missing
                    }
                )
                show(len(hashes))
        return hashes

    def _hash_inputs(self) -> str:
        """Return a hash of all that the sampler is given beside its weights."""
        table = self._table
        tensors = [table.times, table.scales, table.keeps, table.pushes]
        for each in (self._prompt, self._negative):
            tensors += [each.tokens, *([] if each.pooled is None else [each.pooled])]
        digest = hashlib.sha256(json.dumps([table.first_std, *map(_kind, tensors)]).encode())
        for tensor in tensors:
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _kind(tensor: Tensor) -> list[object]:
    return [str(tensor.dtype), list(tensor.shape)]


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
