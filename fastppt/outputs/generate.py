"""Pictures from a finished run."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from fastppt.config import ModelConfig, RunConfig, SamplesConfig
from fastppt.config_io import build_config
from fastppt.data.prompts import quiet_truncation
from fastppt.errors import UserError
from fastppt.families.attention import Projections
from fastppt.families.base import Family
from fastppt.families.loading import load_family, resolve_resolution
from fastppt.outputs.embeddings import check_fits, read_embedding
from fastppt.outputs.files import write_file
from fastppt.outputs.lora_files import LoraWeights, Weights, find_lora_file, read_lora_file
from fastppt.outputs.lora_forms import is_peft_folder
from fastppt.outputs.samples import png_bytes
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables.tokens import LearnedTokens
from fastppt.trainables.trainables import Trainables
from fastppt.trainables_config import LoraConfig

CONFIG_FILE = "config.toml"
# Bytes of a prompt in a picture's name, to which a seed is added.
LONGEST_STEM = 60
# The keys of the model table that say which model it is, and those that say how it reads prompts.
MODEL_KEYS = {"path", "revision", "variant", "config_folder", "vae"}
PROMPT_KEYS = {"large_text_encoder", "max_tokens"}

logger = logging.getLogger(__name__)


def run_config_of(lora: Path) -> RunConfig | None:
    """Return the configuration of the run that a LoRA is of; None where there is none.

    Raises:
        UserError: a file of that name is no configuration of a run.
    """
    folder = lora.absolute() if lora.is_dir() else lora.absolute().parent
    # Beside the LoRA, which peft makes a folder of, or two levels up from OUT/checkpoints/step-N.
    beside = folder.parent if is_peft_folder(lora) else folder
    for place in (beside, folder.parent.parent):
        if (place / CONFIG_FILE).is_file():
            try:
                return build_config(file=place / CONFIG_FILE)
            except UserError as error:
                raise UserError(
                    f"{error}\nIt lies where the configuration of the LoRA's run is looked for; "
                    "if it is none, move the LoRA to another folder"
                ) from None
    return None


def generate(
    lora: Path,
    prompt: str,
    *,
    count: int,
    seed: int | None,
    steps: int | None,
    guidance_scale: float | None,
    resolution: int | None,
    output: Path | None,
    model: Mapping[str, Any],
    embedding: Path | None = None,
) -> list[Path]:
    """Draw pictures with a LoRA and write them as PNG files.

    Picture i is drawn from ``seed + i``. What is None is taken from the run's configuration.

    Args:
        lora: The folder of a run, or a LoRA file.
        prompt: What to draw.
        count: Number of pictures.
        seed: Of the first picture.
        steps: Sampler steps.
        guidance_scale: Classifier-free guidance.
        resolution: Side of the pictures in pixels.
        output: Folder for the pictures; `generated` beside the LoRA if None.
        model: Keys of the `model` table that win over the run's; None leaves one to the run. The
            path is needed where no run's configuration names it.
        embedding: File of a learned word; None looks beside the LoRA for that of its own.

    Raises:
        UserError: no LoRA there, no base model known, the two do not fit, or the prompt says a
            learned word whose file is not there.
    """
    file = find_lora_file(lora)
    config = run_config_of(lora)
    if config is None and model.get("path") is None:
        raise UserError(f"LoRA {lora}: no {CONFIG_FILE} beside it; pass --model")
    samples = config.samples if config else SamplesConfig()
    family = load_family(_model_config(config, model))
    weights = read_lora_file(file, family)
    install_lora(family, weights)
    word_file = find_word(weights, embedding, prompt)
    if word_file is not None:
        install_word(family, word_file, prompt)
    trained_at = config.photos.resolution if config else None
    side = resolve_resolution(resolution or trained_at, family)
    first = samples.seed if seed is None else seed
    seeds = range(first, first + count)
    folder = output or file.parent / "generated"
    paths = [folder / f"{_stem(prompt)}-{number}.png" for number in seeds]
    unread = family.truncated_text(prompt)
    if unread is not None:
        model_path = family.model.path
        logger.warning("--prompt is longer than %s reads; it does not see: %s", model_path, unread)
    with quiet_truncation():
        embeddings = family.encode_prompts([prompt])
    pictures = family.sample(
        embeddings[torch.zeros(count, dtype=torch.int64)],
        family.encode_negative(),
        seeds=seeds,
        resolution=side,
        steps=steps or samples.steps,
        guidance_scale=samples.guidance_scale if guidance_scale is None else guidance_scale,
    )
    for path, picture in zip(paths, pictures, strict=True):
        write_file(path, png_bytes(picture))
    return paths


def _model_config(config: RunConfig | None, given: Mapping[str, Any]) -> ModelConfig:
    wanted = {key: value for key, value in given.items() if value is not None}
    # Not the run's device and precision: pictures are drawn on whatever is here. Another model
    # keeps what says how prompts are read, and nothing that says where the run's model is.
    keys = PROMPT_KEYS if "path" in wanted else MODEL_KEYS | PROMPT_KEYS
    base = config.model.model_dump(include=keys) if config else {}
    try:
        return ModelConfig.model_validate(base | wanted)
    except ValidationError as error:
        wrong = ", ".join(f"model.{'.'.join(map(str, item['loc']))}" for item in error.errors())
        raise UserError(
            f"{wrong}: not a value that fastppt knows; see `fastppt generate --help`"
        ) from None


def install_lora(family: Family, weights: LoraWeights) -> Trainables:
    """Put the adapters of a LoRA file into the family's network and text encoders.

    Raises:
        UserError: they do not fit.
    """
    lora = _install(family, family.make_adaptable(), weights.network, weights.file)
    if not weights.text:
        return Trainables({"lora": lora})
    places = family.text.make_adaptable(family.unread_projections)
    text = _install(family, places, weights.text, weights.file)
    return Trainables({"lora": lora, "text_encoder_lora": text})


def _install(
    family: Family, groups: Sequence[Projections], weights: Weights, file: Path
) -> LoraAdapters:
    ranks = sorted({down.shape[0] for down, _, _ in weights.values()})
    if len(ranks) > 1:
        raise UserError(
            f"LoRA {file}: has ranks {ranks} ({next(iter(weights))} and its like); fastppt reads "
            "files of one rank for the network and one for the text encoders"
        )
    config = LoraConfig(rank=ranks[0], targets=list(weights))
    adapters = LoraAdapters(groups, config, seed=0, device=family.device)
    adapters.load(weights)
    return adapters


def find_word(weights: LoraWeights, given: Path | None, prompt: str) -> Path | None:
    """Return the embedding file to load; None where the prompt says no learned word.

    Args:
        weights: The LoRA, which may name the learned word that it goes with.
        given: The embedding file that the user names, if any.
        prompt: What to draw.

    Raises:
        UserError: the prompt says the LoRA's word, and there is no file of it.
    """
    word = weights.word
    if given is not None or word is None or word.lower() not in prompt.lower():
        return given
    if weights.word_file is None or not weights.word_file.is_file():
        raise UserError(
            f"LoRA {weights.file}: goes with the learned word {word}, which the prompt says, and "
            f"there is no embedding {weights.word_file}; pass --embedding FILE"
        )
    return weights.word_file


def install_word(family: Family, path: Path, prompt: str) -> LearnedTokens:
    """Teach the family's text encoders the word of an embedding file.

    Raises:
        UserError: it cannot be read, is of another model, or its word is one of the model's own.
    """
    embedding = read_embedding(path)
    check_fits(path, embedding, family)
    if embedding.word.lower() not in prompt.lower():
        logger.warning("embedding %s: the prompt does not say its word %s", path, embedding.word)
    try:
        tokens = LearnedTokens(
            family.text, embedding.word, vectors=embedding.num_vectors, device=family.device
        )
    except UserError as error:
        word = embedding.word
        raise UserError(f"embedding {path}: its word {word!r} cannot be one ({error})") from None
    tokens.load(embedding.rows)
    return tokens


def _stem(prompt: str) -> str:
    words = re.sub(r"\W+", "-", prompt.lower()).encode()[:LONGEST_STEM].decode(errors="ignore")
    return words.strip("-") or "picture"
