"""Pictures of the class, banked like photos: what prior preservation trains on beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastppt.config import PromptsConfig
from fastppt.data.buckets import Bucket
from fastppt.data.latents import encode_latents
from fastppt.data.photos import Photo, crop_photo, list_pictures, outline_crop, upright_size
from fastppt.data.prompts import LivePrompts, PromptBank, check_class_prompt, class_prompt
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.stage_config import PriorPreservationConfig


@dataclass(frozen=True)
class ClassImages:
    """The class pictures of a stage, on disk.

    Attributes:
        settings: What the stage says of them, resolved.
        pictures: In the order of their numbers.
        hashes: SHA-256 of each file by its name.
        num_reused: How many were there already.
        seconds: Wall-clock time to have them: drawn, or found and checked.
    """

    settings: PriorPreservationConfig
    pictures: list[Photo]
    hashes: dict[str, str]
    num_reused: int
    seconds: float

    @property
    def is_drawn(self) -> bool:
        """Say whether the base model has drawn them, now or before."""
        return self.settings.folder is None

    def __str__(self) -> str:
        words = class_images_in_words(self.settings)
        if self.is_drawn:
            num_drawn = len(self.pictures) - self.num_reused
            words += f"; {num_drawn} drawn, {self.num_reused} reused"
        return f"{words}; {self.seconds:.1f} s"


def class_images_in_words(settings: PriorPreservationConfig) -> str:
    """Return how many class images a stage has and where from: `100, euler, 50 steps, guidance 5`.

    Args:
        settings: Resolved.
    """
    if settings.folder is not None:
        return f"{settings.num_images} of the folder {settings.folder.name}"
    return (
        f"{settings.num_images}, {settings.sampler}, {settings.steps} steps, guidance "
        f"{settings.guidance_scale:g}"
    )


def find_class_pictures(folder: Path, num_images: int, key: str) -> list[Photo]:
    """Return a folder's first pictures by name; captions beside them are not read.

    Args:
        folder: The user's.
        num_images: How many are wanted.
        key: That of the objective, for messages.

    Raises:
        UserError: no such folder, fewer pictures than are wanted, or a file that is none. Drawn
            pictures do not fill up a folder's: the two are not alike.
    """
    paths = list_pictures(folder, f"{key}.folder")
    if len(paths) < num_images:
        raise UserError(
            f"{key}.folder: {folder} holds {len(paths)} pictures, and {key}.num_images is "
            f"{num_images}; set that to {len(paths)}, or leave the folder out to have them drawn"
        )
    return [read_picture(path, key) for path in paths[:num_images]]


def read_picture(path: Path, key: str) -> Photo:
    """Return a class picture, whose header is read.

    Raises:
        UserError: the file is no picture.
    """
    try:
        return Photo(path, None, None, upright_size(path))
    except UserError as error:
        raise UserError(f"{key}: {str(error).removeprefix('photos: ')}") from None


def encode_class_images(
    family: Family,
    prompts: PromptsConfig,
    pictures: Sequence[Photo],
    size: tuple[int, int],
    on_encoded: Callable[[], object] = lambda: None,
    *,
    move_text: bool = False,
) -> Bucket:
    """Crop and encode class pictures as photos are, each with its own size and the class prompt.

    Args:
        family: The loaded model. Adapters of its text encoders are off meanwhile.
        prompts: The run's.
        pictures: As they were found.
        size: (height, width) of what is trained, pixels.
        on_encoded: Called after each picture.
        move_text: Whether text is trained, so that the class prompt must be encoded anew.

    Returns:
        A bucket in which the class prompt is what the network is asked, of every picture.

    Raises:
        UserError: the class prompt says the new word, or a picture cannot be decoded.
    """
    crops = (crop_photo(picture, size) for picture in pictures)
    latents = encode_latents(family, crops, [()] * len(pictures), on_encoded)
    bank = class_prompt_bank(family, prompts, pictures, size, move_text=move_text)
    return Bucket(size, dict(enumerate(pictures)), latents, bank)


def class_prompt_bank(
    family: Family,
    prompts: PromptsConfig,
    pictures: Sequence[Photo],
    size: tuple[int, int],
    *,
    move_text: bool,
) -> PromptBank:
    """Encode the class prompt, as of `encode_class_images`, with the sizes of the pictures."""
    text = class_prompt(prompts)
    check_class_prompt(family, prompts, text)
    with family.text.base():
        embeddings = family.encode_prompts([text])
    sizes = [
        family.size_conditions(picture.size, outline_crop(picture, size).crop, size)
        for picture in pictures
    ]
    row = torch.zeros(len(pictures), dtype=torch.int64, device=family.device)
    # Nothing aligns the attention to it.
    columns = torch.full_like(row, -1)[:, None].expand(-1, embeddings.tokens.shape[1])
    live = LivePrompts(family.prompt_ids([text]), family) if move_text else None
    return PromptBank(embeddings, row, row, columns, torch.stack(sizes), live)
