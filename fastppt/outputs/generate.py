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
from fastppt.data.prompts import quiet_truncation
from fastppt.errors import UserError
from fastppt.families.attention import Projections
from fastppt.families.base import Family
from fastppt.families.loading import load_family, resolve_resolution
from fastppt.outputs.embeddings import check_fits, embedding_name, read_embedding
from fastppt.outputs.files import write_file
from fastppt.outputs.finished import CONFIG_FILE, run_config_of
from fastppt.outputs.lora_files import (
    LoraWeights,
    Weights,
    find_lora_file,
    has_lora,
    read_lora_file,
)
from fastppt.outputs.lora_metadata import learned_word
from fastppt.outputs.lora_parsing import PEFT_PREFIX
from fastppt.outputs.network_files import put_network_, read_tensors
from fastppt.outputs.peft_form import WEIGHTS_FILE
from fastppt.outputs.samples import png_bytes
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables.peft_tuners import PeftAdapters
from fastppt.trainables.tokens import LearnedTokens
from fastppt.trainables.trainable import Trainable
from fastppt.trainables.trainables import LORA, Trainables
from fastppt.trainables_config import AdapterConfig, LoraConfig

# Bytes of a prompt in a picture's name, to which a seed is added.
LONGEST_STEM = 60
# The keys of the model table that say which model it is, and those that say how it reads prompts.
MODEL_KEYS = {"path", "revision", "variant", "config_folder", "vae"}
PROMPT_KEYS = {"large_text_encoder", "max_tokens"}

logger = logging.getLogger(__name__)


def generate(
    lora: Path | None,
    prompt: str,
    *,
    run: Path | None = None,
    count: int,
    seed: int | None,
    steps: int | None,
    guidance_scale: float | None,
    resolution: int | None,
    output: Path | None,
    model: Mapping[str, Any],
    embedding: Path | None = None,
) -> list[Path]:
    """Draw pictures with what a run has trained, or with a LoRA, and write them as PNG files.

    Picture i is drawn from ``seed + i``. What is None is taken from the run's configuration.

    Args:
        lora: The folder of a run, or a LoRA file; None where ``run`` is given.
        prompt: What to draw.
        run: The folder of a run or of a checkpoint, whatever it trained.
        count: Number of pictures.
        seed: Of the first picture.
        steps: Sampler steps.
        guidance_scale: Classifier-free guidance.
        resolution: Side of the pictures in pixels.
        output: Folder for the pictures; `generated` in the run's folder (of a checkpoint, one of
            its name in there), or beside the LoRA, if None.
        model: Keys of the `model` table that win over the run's; None leaves one to the run. The
            path is needed where no run's configuration names it.
        embedding: File of a learned word; None looks beside the LoRA for that of its own.

    Raises:
        UserError: no run or LoRA there, no base model known, the two do not fit, or the prompt
            says a learned word whose file is not there.
    """
    if run is not None and lora is None:
        config: RunConfig | None = (trained := find_run(run))
        family = load_family(_model_config(config, model))
        install_run(family, run, trained, embedding, prompt)
        folder = run
    elif lora is not None and run is None:
        file, config = find_lora_file(lora), run_config_of(lora)
        _refuse_half(lora, config)
        if config is None and model.get("path") is None:
            raise UserError(f"LoRA {lora}: no {CONFIG_FILE} beside it; pass --model")
        family = load_family(_model_config(config, model))
        weights = read_lora_file(file, family)
        install_lora(family, weights)
        word_file = find_word(file, weights.word, weights.word_file, embedding, prompt)
        if word_file is not None:
            install_word(family, word_file, prompt)
        folder = file.parent
    else:
        raise UserError("pass --run FOLDER or --lora FILE: one of them, and not both")
    samples = config.samples if config else SamplesConfig()
    trained_at = config.photos.resolution if config else None
    side = resolve_resolution(resolution or trained_at, family)
    first = samples.seed if seed is None else seed
    seeds = range(first, first + count)
    pictures = output or _place_of_pictures(folder)
    paths = [pictures / f"{_stem(prompt)}-{number}.png" for number in seeds]
    unread = family.truncated_text(prompt)
    if unread is not None:
        model_path = family.model.path
        logger.warning("--prompt is longer than %s reads; it does not see: %s", model_path, unread)
    with quiet_truncation():
        embeddings = family.encode_prompts([prompt])
    drawn = family.sample(
        embeddings[torch.zeros(count, dtype=torch.int64)],
        family.encode_negative(),
        seeds=seeds,
        resolution=side,
        steps=steps or samples.steps,
        guidance_scale=samples.guidance_scale if guidance_scale is None else guidance_scale,
    )
    for path, picture in zip(paths, drawn, strict=True):
        write_file(path, png_bytes(picture))
    return paths


def find_run(folder: Path) -> RunConfig:
    """Return the configuration of the run whose folder, or checkpoint, it is.

    Raises:
        UserError: it is none.
    """
    config = run_config_of(folder) if folder.is_dir() else None
    if config is None or config.output is None:
        raise UserError(f"run {folder}: is no folder of a run (no {CONFIG_FILE}), nor a checkpoint")
    return config


def install_run(
    family: Family, folder: Path, config: RunConfig, embedding: Path | None, prompt: str
) -> None:
    """Put what a run has trained into a family of its base model.

    Args:
        family: New.
        folder: Of the run or of a checkpoint.
        config: The run's.
        embedding: As of `find_word`.
        prompt: Likewise.

    Raises:
        UserError: a file is missing, or does not fit.
    """
    weights = read_lora_file(find_lora_file(folder), family) if has_lora(config) else None
    _, table = config.trainables.get(config.network or "", (0, None))
    if isinstance(table, AdapterConfig):
        _install_adapters(family, folder, table)
        if weights is not None:
            _install_text(family, weights)
    else:
        if config.network not in (None, LORA):
            put_network_(family.network, family.lora_component, folder, config)
        install_lora(family, weights)
    word = learned_word(config)
    own_file = None if word is None else folder.absolute() / embedding_name(word)
    word_file = find_word(folder, word, own_file, embedding, prompt)
    if word_file is not None:
        install_word(family, word_file, prompt)


def _refuse_half(lora: Path, config: RunConfig | None) -> None:
    """Refuse the LoRA of text encoders for all that a run has trained."""
    if lora.is_dir() and config is not None and config.network not in (None, LORA):
        raise UserError(
            f"LoRA {lora}: that run trained the network by {config.network}, and its LoRA file has "
            f"adapters of text encoders alone; pass --run {lora}"
        )


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


def install_lora(family: Family, weights: LoraWeights | None) -> Trainables:
    """Put the adapters of a LoRA file into the family's network and text encoders.

    Args:
        family: Whose attention runs by its model's backend from here on, with a LoRA or without.
        weights: None for no adapters.

    Raises:
        UserError: they do not fit.
    """
    groups = family.make_adaptable()
    parts: dict[str, Trainable] = {}
    if weights is not None and weights.network:
        parts["lora"] = _install(family, groups, weights.network, weights.file)
    if weights is not None and weights.text:
        parts["text_encoder_lora"] = _install_text(family, weights)
    return Trainables(parts)


def _install_adapters(family: Family, folder: Path, table: AdapterConfig) -> None:
    """Put adapters in peft's form where those of a training are, so that they run like them."""
    file = folder / WEIGHTS_FILE
    saved = {key.removeprefix(PEFT_PREFIX): each for key, each in read_tensors(file)[0].items()}
    adapters = PeftAdapters(
        family.make_adaptable(), table, seed=0, device=family.device, key=f"{file}"
    )
    for name, tensor in adapters.tensors.items():
        if name not in saved or saved[name].shape != tensor.shape:
            raise UserError(f"{file}: has no {name} of {list(tensor.shape)}; is it of this model?")
        tensor.copy_(saved[name])


def _install_text(family: Family, weights: LoraWeights) -> LoraAdapters:
    places = family.text.make_adaptable(family.unread_projections)
    return _install(family, places, weights.text, weights.file)


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


def find_word(
    source: Path, word: str | None, file: Path | None, given: Path | None, prompt: str
) -> Path | None:
    """Return the embedding file to load; None where the prompt says no learned word.

    Args:
        source: The LoRA, or the run's folder.
        word: The learned word that goes with it, if any.
        file: Where the embedding of that belongs.
        given: The embedding file that the user names, if any.
        prompt: What to draw.

    Raises:
        UserError: the prompt says the word, and there is no file of it.
    """
    if given is not None or word is None or word.lower() not in prompt.lower():
        return given
    if file is None or not file.is_file():
        raise UserError(
            f"{source}: goes with the learned word {word}, which the prompt says, and there "
            f"is no embedding {file}; pass --embedding FILE"
        )
    return file


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


def _place_of_pictures(folder: Path) -> Path:
    """Return where pictures go; not into a checkpoint, which a run deletes when its time comes."""
    run = folder.absolute().parent.parent
    if folder.absolute().parent.name == "checkpoints" and (run / CONFIG_FILE).is_file():
        return run / "generated" / folder.name
    return folder / "generated"


def _stem(prompt: str) -> str:
    words = re.sub(r"\W+", "-", prompt.lower()).encode()[:LONGEST_STEM].decode(errors="ignore")
    return words.strip("-") or "picture"
