"""The files of a run: written when it ends, found and read when another starts from them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.lora_keys import FAMILY_KEY, Detection, LayerName, has_kohya_form
from fastppt.families.text_encoders import PROJECTIONS
from fastppt.outputs.adapters import DTYPES, Adapter, Form, LoraFile
from fastppt.outputs.embeddings import SUFFIX, embedding_name, write_embedding
from fastppt.outputs.finished import run_config_of
from fastppt.outputs.lora_forms import is_peft_folder, read_lora, write_lora
from fastppt.outputs.lora_metadata import WORD_KEY, learned_word, run_metadata, word_entry
from fastppt.trainables.lora import LoraPair
from fastppt.trainables.trainables import LORA, TEXT_ENCODER_LORA, Trainables

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
# What of a text encoder can be adapted.
TEXT_PROJECTIONS = tuple(f"self_attn.{name}" for name in PROJECTIONS)

logger = logging.getLogger(__name__)


def write_lora_files(
    folder: Path,
    config: RunConfig,
    family: Family,
    trainables: Trainables,
    photo_counts: Mapping[tuple[int, int], int],
) -> list[Path]:
    """Write adapters and words for diffusers and, with all metadata, for other programs.

    The second LoRA file has the kohya form where the family has one, else the diffusers form again.
    Without adapters there is no LoRA file, and without a word no embedding.

    Args:
        folder: Where to.
        config: The run's, resolved.
        family: Whose model was trained.
        trainables: What was trained.
        photo_counts: Number of photos that were trained at each (height, width), pixels.

    Returns:
        The files' paths: diffusers' LoRA, the other LoRA, and the embedding of a learned word.
    """
    files = write_diffusers_files(folder, config, family, trainables)
    adapters = trainables.lora or trainables.text_encoder_lora
    if adapters is None:
        return files
    diffusers_file, *others = files
    named_file = folder / f"{lora_name(config)}{SUFFIX}"
    form: Form = "kohya" if has_kohya_form(family.name) else "diffusers"
    # Other programs than diffusers take alpha for the rank in its form: there it is folded.
    alpha = adapters.alpha if form == "kohya" else float(adapters.rank)
    metadata = run_metadata(config, family, adapters.rank, alpha, named_file.stem, photo_counts)
    lora = lora_of_run(family, trainables, metadata)
    lora = lora if form == "kohya" else lora.folded()
    write_lora(named_file, lora.cast(DTYPES[config.save_dtype]), form)
    return [diffusers_file, named_file, *others]


def write_diffusers_files(
    folder: Path, config: RunConfig, family: Family, trainables: Trainables
) -> list[Path]:
    """Write the adapters in the diffusers form, alpha folded into the up side, and a learned word.

    Returns:
        The files' paths: the LoRA, and the embedding where a word is trained.
    """
    files = []
    if trainables.pairs:
        files.append(folder / DIFFUSERS_FILE)
        metadata = {FAMILY_KEY: family.name} | word_entry(config)
        lora = lora_of_run(family, trainables, metadata)
        write_lora(files[0], lora.folded().cast(DTYPES[config.save_dtype]), "diffusers")
    if trainables.tokens is not None:
        files.append(write_embedding(folder, config, family, trainables.tokens.rows))
    return files


def lora_files_of_run(config: RunConfig) -> list[str]:
    """Return the names of the files that `write_lora_files` leaves."""
    word = learned_word(config)
    names = [DIFFUSERS_FILE, f"{lora_name(config)}{SUFFIX}"] if has_lora(config) else []
    return names if word is None else [*names, embedding_name(word)]


def has_lora(config: RunConfig) -> bool:
    """Say whether a run leaves LoRA files: of the network, of the text encoders, or of both."""
    return not {LORA, TEXT_ENCODER_LORA}.isdisjoint(config.trainables)


def lora_of_run(family: Family, trainables: Trainables, metadata: dict[str, str]) -> LoraFile:
    """Return a run's adapters as a file in memory, on the host: the network's, then the text's."""
    copies: dict[LayerName, Adapter] = {}
    if trainables.lora is not None:
        alpha = trainables.lora.alpha
        for pair in trainables.lora.pairs:
            copies[family.lora_component, pair.name] = _on_host(pair, alpha)
    if trainables.text_encoder_lora is not None:
        alpha = trainables.text_encoder_lora.alpha
        for pair in trainables.text_encoder_lora.pairs:
            component, _, path = pair.name.partition(".")
            copies[component, path] = _on_host(pair, alpha)
    return LoraFile(copies, metadata, "diffusers", Detection(family.name, "the run's model"))


def run_name(config: RunConfig) -> str:
    """Return the name of the run: the config's, or that of the output folder."""
    assert config.output is not None
    return config.name or config.output.resolve().name or "lora"


def lora_name(config: RunConfig) -> str:
    """Return the name of the LoRA file for other programs than diffusers: the run's.

    Where the network moves otherwise, the file holds adapters of text encoders alone and says so.
    """
    ending = "" if config.network in (None, LORA) else "-text"
    return f"{run_name(config)}{ending}"


def find_lora_file(path: Path) -> Path:
    """Return what to read for what the user calls a LoRA: a file, a run's folder, or peft's.

    Of a run's folder it is the file with the metadata, where alpha is not folded if its form has a
    place for it.

    Raises:
        UserError: there is none, the run left none, or it is not a .safetensors file.
    """
    config = run_config_of(path) if path.is_dir() else None
    if config is not None and config.output is not None and not has_lora(config):
        raise UserError(
            f"LoRA {path}: that run trained {' and '.join(config.trainables)}, which gives no "
            f"LoRA; `fastppt generate --run {path}` draws with it, and fastppt.load(pipe, "
            f'"{path}") puts it into a pipeline of diffusers'
        )
    if is_peft_folder(path) and not (path / DIFFUSERS_FILE).is_file():
        return path
    file = path
    if path.is_dir():
        file = path / DIFFUSERS_FILE
        if config is not None and config.output is not None:
            named = path / f"{lora_name(config)}{SUFFIX}"
            file = named if named.is_file() else file
    if not file.is_file():
        raise UserError(f"LoRA {path}: there is no file {file}; is the run finished?")
    if file.suffix != SUFFIX:
        raise UserError(f"LoRA {path}: must be a {SUFFIX} file (others can run code when read)")
    return file


Weights = dict[str, tuple[Tensor, Tensor, float]]
"""By the name of a projection: down [r, I], up [O, r], scale; as `LoraAdapters.load` takes them."""


@dataclass(frozen=True)
class LoraWeights:
    """What a LoRA file adds to a family's weights, float32 at least.

    Attributes:
        file: The file, or peft's folder.
        network: By module path.
        text: By component and path of the text encoders; empty where the file adapts none.
        word: The learned word that the file's prompts want; None where it names none.
    """

    file: Path
    network: Weights
    text: Weights
    word: str | None

    @property
    def word_file(self) -> Path | None:
        """Where the embedding of the word belongs: beside the file."""
        place = self.file.absolute().parent
        return None if self.word is None else place / embedding_name(self.word)


def read_lora_file(path: Path, family: Family, *, text: bool = True) -> LoraWeights:
    """Read a LoRA of any form for a family's network and text encoders.

    Args:
        path: The file, the folder of a run, or a folder of peft's.
        family: Whose model it is for.
        text: Whether there is a place for adapters of the text encoders; a file with some is
            refused if not.

    Raises:
        UserError: it cannot be read, is of another family, or adapts what has no place.
    """
    file = find_lora_file(path)
    lora = read_lora(file)
    told = lora.detection
    if told.family not in (None, family.name):
        raise UserError(
            f"LoRA {file}: is of the family {told.family} ({told.evidence}), and the model "
            f"{family.model.path} is of the family {family.name}; use a model of its own family"
        )
    network: Weights = {}
    encoders: Weights = {}
    unread: list[str] = []
    for (component, name), one in lora.adapters.items():
        precise = torch.promote_types(one.down.dtype, torch.float32)
        weights = (one.down.to(precise), one.up.to(precise), one.scale)
        place = name if component == family.lora_component else f"{component}.{name}"
        if place in family.unread_projections:
            unread.append(place)
        elif component in family.text.clips:
            _check_text_layer(file, component, name, one.rank, text)
            encoders[place] = weights
        elif component != family.lora_component:
            places = ", ".join((family.lora_component, *family.text.clips))
            raise UserError(
                f"LoRA {file}: {component}.{name} is no layer of {places}, the parts that fastppt "
                "adapts; a file without it is needed"
            )
        else:
            network[name] = weights
    if unread:
        note = "LoRA %s: adapters are left out, for nothing reads what these layers give: %s"
        logger.warning(note, file, ", ".join(unread))
    if not network and not encoders:
        raise UserError(f"LoRA {file}: adapts no layer that fastppt could adapt")
    return LoraWeights(file, network, encoders, lora.metadata.get(WORD_KEY))


def _check_text_layer(file: Path, component: str, name: str, rank: int, text: bool) -> None:
    if not name.endswith(TEXT_PROJECTIONS):
        raise UserError(
            f"LoRA {file}: adapts {component}.{name}; of a text encoder fastppt adapts "
            f"{', '.join(TEXT_PROJECTIONS)} alone, so a file without it is needed"
        )
    if not text:
        raise UserError(
            f"LoRA {file}: adapts the {component} too, which this run leaves as it is; "
            f"pass --set stage.0.trainables.text_encoder_lora.rank={rank} to train both, "
            "or give a file without it"
        )


def _on_host(pair: LoraPair, alpha: float) -> Adapter:
    """Return a copy of an adapter on the host, contiguous."""
    down, up = (side.detach().to("cpu").contiguous().clone() for side in (pair.down, pair.up))
    return Adapter(down, up, alpha)
