"""What a run was trained on, in hashes: so that it is resumed on the same, or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fastppt import __version__
from fastppt.data.buckets import Bucket
from fastppt.data.class_images import ClassImages
from fastppt.data.photos import Photo
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.training.checkpoint import Identity

PACKAGES = ("torch", "diffusers", "transformers")
# Integer types to read the bits of an element of so many bytes with.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def identify(
    photos: Sequence[Photo],
    weights: str,
    buckets: Sequence[Bucket],
    class_images: Mapping[int, ClassImages] = MappingProxyType({}),
    class_sets: Mapping[int, Bucket] = MappingProxyType({}),
) -> Identity:
    """Return what a run is trained on.

    Args:
        photos: The subject's, read again for their hashes.
        weights: What `fingerprint_weights` returned.
        buckets: With all that was encoded, before the first step.
        class_images: Of prior preservation, by stage.
        class_sets: What these were encoded to.
    """
    encoded = {str(number): bucket for number, bucket in enumerate(buckets)}
    encoded |= {f"class.{index}": bucket for index, bucket in class_sets.items()}
    return Identity(
        photos=hash_photos(photos),
        captions={_name(photo): photo.caption for photo in photos},
        weights=weights,
        encodings=fingerprint(
            (f"{place}.{name}", tensor)
            for place, bucket in encoded.items()
            for name, tensor in _encodings(bucket)
        ),
        class_images={str(index): images.hashes for index, images in class_images.items()},
    )


def hash_photos(photos: Sequence[Photo]) -> dict[str, str]:
    """Return the SHA-256 of each photo's file, by its name."""
    hashes = {}
    for photo in photos:
        with photo.path.open("rb") as file:
            hashes[_name(photo)] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def fingerprint_weights(family: Family, *, with_text: bool) -> str:
    """Return a fingerprint of the base's weights and buffers.

    Args:
        family: The loaded model, before anything is put into it.
        with_text: Take in the text encoders that can be trained, beside the network.
    """
    modules: dict[str, nn.Module] = {"network": family.network}
    if with_text:
        modules |= family.text.clips
    return fingerprint(
        [
            (f"{part}.{name}", tensor)
            for part, module in modules.items()
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        ]
    )


def fingerprint(tensors: Iterator[tuple[str, Tensor]] | Sequence[tuple[str, Tensor]]) -> str:
    """Return a hash of tensors by name: of name, dtype, shape, and the sum of the bits of each.

    The bits of an element are taken as an integer, and the sum wraps at 2^64: one pass over the
    memory on the device, and one read on the host. Elements that change places go unnoticed.
    """
    kinds, sums = [], []
    for name, tensor in tensors:
        kinds.append((name, str(tensor.dtype), list(tensor.shape)))
        bits = tensor.detach().view(BITS[tensor.element_size()])
        sums.append(bits.sum(dtype=torch.int64))
    values = torch.stack(sums).tolist()
    return hashlib.sha256(json.dumps([kinds, values]).encode()).hexdigest()


def check_photos(saved: Identity, photos: Sequence[Photo]) -> None:
    """Refuse to go on with other photos or captions than those that were trained on.

    Raises:
        UserError: names the photo.
    """
    hashes = hash_photos(photos)
    captions = {_name(photo): photo.caption for photo in photos}
    for name in sorted(saved.photos.keys() | hashes.keys()):
        if name not in hashes:
            change = f"{name} is gone"
        elif name not in saved.photos:
            change = f"{name} is new"
        elif hashes[name] != saved.photos[name]:
            change = f"{name} has changed"
        elif captions[name] != saved.captions[name]:
            change = f"the caption of {name} has changed"
        else:
            continue
        raise UserError(
            f"photos: {change} since the run began; put back what it was trained on, or start a "
            "new run"
        )


def check_class_images(saved: Identity, class_images: Mapping[int, ClassImages]) -> None:
    """Refuse to go on with other class images of a user's own than those that were trained on.

    Drawn ones may differ in their last bits where another machine has drawn them again; what they
    are encoded to is compared with all that is.

    Args:
        saved: What the run began with.
        class_images: By stage.

    Raises:
        UserError: names the folder.
    """
    for index, images in class_images.items():
        if not images.is_drawn and saved.class_images.get(str(index)) != images.hashes:
            raise UserError(
                f"stage.{index}.objectives.prior_preservation.folder: the pictures in "
                f"{images.settings.folder} are not those that the run began with; put these back, "
                "or start a new run"
            )


def check_weights(saved: Identity, weights: str) -> None:
    """Refuse to go on with another base network than was trained.

    Args:
        saved: What the run began with.
        weights: What `fingerprint_weights` returned.

    Raises:
        UserError: says that it is the model.
    """
    if saved.weights != weights:
        raise UserError(
            "model.path: the model's weights are not those that the run began with; give it the "
            "same model, or start a new run"
        )


def describe_machine(device: torch.device) -> dict[str, str]:
    """Return the versions and the device that numbers may depend on in their last bits."""
    is_gpu = device.type == "cuda"
    device_name = torch.cuda.get_device_name(device) if is_gpu else device.type
    # Not of what is installed: a checkout may be run as it is.
    versions = {"fastppt": __version__, **{name: version(name) for name in PACKAGES}}
    return {**versions, "device": device_name}


def _name(photo: Photo) -> str:
    """Return the name of a photo's file; bytes that are no text in UTF-8 become escapes."""
    return photo.path.name.encode("utf-8", "backslashreplace").decode()


def _encodings(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """Return what a bucket's photos and prompts were encoded to, but for text that moves."""
    prompts = bucket.prompts
    photos = torch.arange(bucket.num_photos, device=prompts.sizes.device)
    yield "latents", bucket.latents.posteriors
    yield "columns", prompts.columns
    yield "sizes", prompts.sizes
    texts = {"class": prompts.plain_class(photos)}
    if prompts.live is None:
        texts["subject"] = prompts.subject(photos)
    for kind, text in texts.items():
        yield f"{kind}.tokens", text.tokens
        if text.pooled is not None:
            yield f"{kind}.pooled", text.pooled
