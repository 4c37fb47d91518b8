"""What a LoRA or an embedding file is: read from the file alone, no model loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastppt.families.lora_keys import LayerName
from fastppt.outputs.adapters import Adapter, LoraFile
from fastppt.outputs.embeddings import Embedding, family_of, is_embedding_file, read_embedding
from fastppt.outputs.lora_files import find_lora_file
from fastppt.outputs.lora_forms import read_lora
from fastppt.outputs.lora_metadata import WORD_KEY

# Characters of a metadata entry that are shown.
SHOWN_LENGTH = 100
# A layer's path up to the block that it counts to, and up to the last of the numbered modules.
BLOCK = re.compile(
    r"(?:down_blocks|up_blocks|transformer_blocks|.*\blayers|.*\bblock)\.\d+|mid_block"
)
CONTAINERS = re.compile(
    r".*\b(?:transformer_blocks|attentions|resnets|down_blocks|up_blocks|layers|layer|block)\.\d+\."
)


@dataclass(frozen=True)
class LoraInfo:
    """What `fastppt info` says.

    Attributes:
        path: The file, or peft's folder.
        lora: What is in it.
        norms: Frobenius norm of what is added to the weights, by component and block.
        warnings: What is wrong with the values.
    """

    path: Path
    lora: LoraFile
    norms: dict[str, float]
    warnings: list[str]


@dataclass(frozen=True)
class EmbeddingInfo:
    """What `fastppt info` says of an embedding file.

    Attributes:
        path: The file.
        embedding: What is in it.
    """

    path: Path
    embedding: Embedding


def read_info(path: Path) -> LoraInfo | EmbeddingInfo:
    """Read a LoRA file, a run's folder or peft's, or an embedding file, and look at its values.

    Raises:
        UserError: it cannot be read.
    """
    file = find_lora_file(path)
    if is_embedding_file(file):
        return EmbeddingInfo(file, read_embedding(file))
    lora = read_lora(file)
    squares: dict[str, float] = {}
    for layer, one in lora.adapters.items():
        block = block_of(layer)
        squares[block] = squares.get(block, 0.0) + squared_norm(one)
    norms = {block: squares[block] ** 0.5 for block in sorted(squares, key=_by_number)}
    return LoraInfo(file, lora, norms, _warnings(lora))


def squared_norm(adapter: Adapter) -> float:
    """Return ||scale B A||^2 (Frobenius) in float64, without forming B A.

    ||s B A||^2 = s^2 tr((B^T B)(A A^T)). Rounding can make a tiny negative of it: cut at zero.
    """
    down_ri = adapter.down.double().flatten(1)
    up_or = adapter.up.double().flatten(1)
    trace = ((up_or.T @ up_or) * (down_ri @ down_ri.T)).sum()
    # A NaN stays one.
    return float(adapter.scale**2 * torch.clamp(trace, min=0.0))


def block_of(layer: LayerName) -> str:
    """Return component and block of a layer, such as ``unet down_blocks.1``."""
    component, path = layer
    match = BLOCK.match(path)
    return f"{component} {match[0] if match else path.split('.')[0]}"


def target_patterns(layers: Iterable[LayerName]) -> Counter[str]:
    """Return patterns of the adapted layers, such as ``*.attn1.to_q``, and how many each fits."""
    return Counter(CONTAINERS.sub("*.", path) for _, path in layers)


def print_info(info: LoraInfo | EmbeddingInfo, console: Console) -> None:
    """Print what a file is."""
    if isinstance(info, EmbeddingInfo):
        console.print(_table(_embedding_facts(info)))
        metadata, warnings = info.embedding.metadata, _embedding_warnings(info.embedding)
    else:
        console.print(_table(_facts(info)))
        norms = Table("block", "norm of the change", title="what it adds to the weights")
        for block, norm in info.norms.items():
            norms.add_row(Text(block), f"{norm:.4g}")
        console.print(norms)
        metadata, warnings = info.lora.metadata, info.warnings
    if metadata:
        entries = Table("metadata", "", title=f"{len(metadata)} entries")
        for key, value in sorted(metadata.items()):
            text = " ".join(value.split())
            cut = text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}..."
            entries.add_row(Text(key), Text(cut))
        console.print(entries)
    for warning in warnings:
        console.print(Text(f"warning: {warning}"), style="yellow", soft_wrap=True)


def _table(facts: dict[str, str]) -> Table:
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, Text(value, overflow="fold"))
    return table


def _embedding_facts(info: EmbeddingInfo) -> dict[str, str]:
    one = info.embedding
    rows = list(one.rows.values())
    return {
        "file": str(info.path),
        "form": "embedding of a learned word",
        "word": one.word,
        "family": family_of(one),
        "vectors": str(one.num_vectors),
        "width": ", ".join(f"{row.shape[1]} ({name})" for name, row in one.rows.items()),
        "type": _counts(Counter(str(row.dtype).removeprefix("torch.") for row in rows)),
        "norms": ", ".join(
            " ".join(f"{norm:.4g}" for norm in row.double().norm(dim=1).tolist()) + f" ({name})"
            for name, row in one.rows.items()
        ),
    }


def _embedding_warnings(embedding: Embedding) -> list[str]:
    bad = [name for name, row in embedding.rows.items() if not row.isfinite().all()]
    return [f"vectors for {name} hold NaN or infinity" for name in bad]


def _by_number(block: str) -> list[str | int]:
    """Return a key that puts block 2 before block 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", block)]


def _facts(info: LoraInfo) -> dict[str, str]:
    lora = info.lora
    adapters = lora.adapters.values()
    told = lora.detection
    tensors = [tensor for one in adapters for tensor in (one.down, one.up)]
    targets = target_patterns(lora.adapters)
    return {
        "file": str(info.path),
        "form": lora.form,
        "family": f"{told.family or 'unknown'} ({told.evidence})",
        "components": _counts(Counter(component for component, _ in lora.adapters)),
        "adapters": str(len(adapters)),
        "rank": _counts(Counter(one.rank for one in adapters)),
        "alpha": _counts(Counter(f"{one.alpha:g}" for one in adapters)),
        "type": _counts(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)),
        "parameters": f"{sum(tensor.numel() for tensor in tensors):,}",
        "targets": _counts(targets, always=True),
    } | ({"learned word": word} if (word := lora.metadata.get(WORD_KEY)) else {})


def _counts(counter: Counter[str] | Counter[int], *, always: bool = False) -> str:
    """Return values and how often each occurs, the most frequent first."""
    if len(counter) == 1 and not always:
        return str(next(iter(counter)))
    return ", ".join(f"{value} ({count})" for value, count in counter.most_common())


def _warnings(lora: LoraFile) -> list[str]:
    bad, silent = [], []
    for layer, one in lora.adapters.items():
        if not (one.down.float().isfinite().all() and one.up.float().isfinite().all()):
            bad.append(".".join(layer))
        elif one.alpha == 0 or not one.down.any() or not one.up.any():
            silent.append(".".join(layer))
    lines = {"hold NaN or infinity": bad, "change nothing: a side or alpha is all zero": silent}
    warnings = [
        f"{len(names)} of {len(lora.adapters)} adapters {what} (the first: {names[0]})"
        for what, names in lines.items()
        if names
    ]
    if lora.form == "kohya" and len({one.alpha for one in lora.adapters.values()}) > 1:
        # Seen in diffusers 0.42: the names in its alpha_pattern match no module.
        warnings.append(
            "alphas differ, and diffusers applies one of them to all layers of a kohya file; "
            "`fastppt convert --to diffusers` writes a file that it reads right"
        )
    return warnings
