"""A new word's rows are trained, and nothing else of the tables is."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.objectives.anchor import anchored_groups
from fastppt.stage_config import AnchorConfig
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables.tokens import LearnedTokens
from fastppt.trainables.trainables import LORA, TOKENS, Trainables
from fastppt.trainables_config import LoraConfig
from fastppt_kernels import AnchoredAdamW

MODELS = ["mini-sd", "mini-sdxl", "mini-sd3"]
PROMPTS = ["a photo of <v> on the beach", "a dog"]


def load(model: str, dtype: torch.dtype = torch.float64) -> Family:
    return load_family(ModelConfig(path=model, device="cpu"), dtype=dtype)


def teach(family: Family, vectors: int = 1, init: str | None = "dog", **keys: Any) -> LearnedTokens:
    keys.setdefault("dtype", torch.promote_types(family.dtype, torch.float32))
    return LearnedTokens(
        family.text, "<v>", vectors=vectors, init=init, device=family.device, **keys
    )


def rows_of(family: Family, words: str) -> dict[str, Tensor]:
    """What the tables have for words, each of which is one token."""
    found = {}
    for component in family.text.clips:
        tokenizer = getattr(family._pipeline, component.replace("text_encoder", "tokenizer"))
        ids = tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in words.split()])
        found[component] = family.text.table(component).weight[ids]
    return found


@pytest.mark.parametrize("model", MODELS)
def test_a_word_begins_as_the_words_it_starts_from(model: str) -> None:
    family = load(model)
    wanted = rows_of(family, "red dog")
    tokens = teach(family, 2, "red dog")
    assert tokens.words == ("<v>", "<v>_1") and tokens.rows.keys() == family.text.clips.keys()
    for component, rows in tokens.rows.items():
        assert torch.equal(rows, wanted[component])
    # A T5 reads the words themselves.
    read = slice(family.text.num_tokens)
    written = family.encode_prompts(["a photo of red dog"]).tokens[:, read]
    assert torch.equal(family.encode_prompts(["a photo of <v>"]).tokens[:, read], written)


@pytest.mark.parametrize(("vectors", "init"), [(1, "red dog"), (3, "red dog"), (2, "dog")])
def test_other_numbers_of_vectors_begin_as_the_mean(
    family_float64: Family, vectors: int, init: str
) -> None:
    wanted = rows_of(family_float64, init)
    for component, rows in teach(family_float64, vectors, init).rows.items():
        assert rows.shape[0] == vectors
        mean = wanted[component].mean(dim=0).expand(vectors, -1)
        torch.testing.assert_close(rows, mean, rtol=1e-12, atol=0)


def test_words_that_are_nothing_are_no_start(family: Family) -> None:
    with pytest.raises(UserError, match=r"trainables.tokens.init: the model reads nothing in ' '"):
        teach(family, init=" ")


class Allocations(TorchDispatchMode):
    """Notes the most elements of a floating tensor that an op makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if _floats(t)}
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_iter(outputs):
            if _floats(tensor) and tensor.untyped_storage()._cdata not in inputs:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return outputs


def _floats(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def test_no_gradient_of_a_table_is_made_and_no_copy_of_one(family: Family) -> None:
    tokens = teach(family)
    tables = [family.text.table(component) for component in family.text.clips]
    ids = family.prompt_ids(PROMPTS)
    with Allocations() as allocations:
        family.encode_ids(ids).tokens.square().sum().backward()
    assert 0 < allocations.largest < min(table.weight.nbytes for table in tables) / 2
    assert all(table.weight.grad is None and not table.weight.requires_grad for table in tables)
    assert all(tensor.grad.any() for tensor in tokens.arena.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_places_of_the_word_give_a_gradient(dtype: torch.dtype) -> None:
    """Of a sum over the embeddings themselves: one for each place; a frozen token gives none."""
    family = load("mini-sd", dtype)
    tokens = teach(family, 2)
    ids = family.text.ids(["<v> dog <v>", "a dog", "the <v>"])["text_encoder"]
    table = family.text.clips["text_encoder"].get_input_embeddings()
    embeddings = table(ids)
    assert embeddings.dtype == dtype and embeddings.requires_grad
    (embeddings * torch.arange(1, 4)[:, None, None]).sum().backward()
    gradient = tokens.arena.tensors[0].grad
    assert torch.equal(gradient, torch.full_like(gradient, 2 * 1.0 + 3.0))
    frozen = ids < ids.max() - 1
    expected = nn.functional.embedding(ids[frozen], table.weight)
    assert torch.equal(embeddings[frozen], expected)


def trainables_of(family: Family, tokens: LearnedTokens) -> Trainables:
    lora = LoraAdapters(family.make_adaptable(), LoraConfig(rank=1), seed=0, device=family.device)
    return Trainables({"lora": lora, "tokens": tokens})


@pytest.mark.parametrize("form", ["raw", "effective", "decoupled"])
def test_the_anchor_holds_rows_where_they_began(family: Family, form: str) -> None:
    tokens = teach(family)
    start = tokens.arena.flat.detach().clone()
    rates = {LORA: torch.tensor(0.1), TOKENS: torch.tensor(0.1)}
    anchor = AnchorConfig(weight=2.0, form=form, to="zero")
    _, group = anchored_groups(trainables_of(family, tokens), rates, anchor)
    assert (group["form"], group["anchor"]) == ("raw" if form == "effective" else form, "start")
    optimizer = AnchoredAdamW([group], weight_decay=0.0)
    tokens.arena.flat.detach().add_(1.0)
    optimizer.step()
    moved = tokens.arena.flat.detach() - (start + 1.0)
    assert (moved[: tokens.rows["text_encoder"].numel()] < 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_lengths_are_those_of_the_start(dtype: torch.dtype) -> None:
    family = load("mini-sdxl", dtype)
    tokens = teach(family, 2, "red dog")
    lengths = [rows.norm(dim=1) for rows in tokens.rows.values()]
    directions = []
    for rows in tokens.rows.values():
        rows.add_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)))
        directions.append(rows / rows.norm(dim=1, keepdim=True))
    before = tokens.arena.flat.detach().clone()
    tokens.keep_norms_(torch.tensor(True))
    assert torch.equal(tokens.arena.flat, before)
    tokens.keep_norms_(torch.tensor(False))
    for rows, length, direction in zip(tokens.rows.values(), lengths, directions, strict=True):
        torch.testing.assert_close(rows.norm(dim=1), length)
        torch.testing.assert_close(rows / rows.norm(dim=1, keepdim=True), direction)
        assert not torch.allclose(rows, before[: rows.numel()].view_as(rows))
    copy = tokens.arena.working_copy
    assert copy is None or torch.equal(copy, tokens.arena.flat.detach().to(dtype))


def test_loaded_values_are_read_and_wrong_ones_are_refused(family: Family) -> None:
    tokens = teach(family, 2)
    rows = {name: torch.randn(own.shape) for name, own in tokens.rows.items()}
    before = tokens.arena.flat.detach().clone()
    with pytest.raises(UserError, match=r"for text_encoder, and the model wants.*text_encoder_2"):
        tokens.load({"text_encoder": rows["text_encoder"]})
    with pytest.raises(UserError, match=r"shape \(1, 80\) for text_encoder_2, wanted \(2, 80\)"):
        tokens.load(rows | {"text_encoder_2": rows["text_encoder_2"][:1]})
    assert torch.equal(tokens.arena.flat, before)
    tokens.load(rows)
    ids = family.text.ids(["<v>"])["text_encoder"]
    embeddings = family.text.clips["text_encoder"].get_input_embeddings()(ids)
    assert torch.equal(embeddings[0, 1:3], rows["text_encoder"])


def test_released_encoders_leave_their_memory(family: Family) -> None:
    tokens = teach(family)
    tables = [weakref.ref(family.text.table(component)) for component in family.text.clips]
    family.release_encoders()
    assert all(table() is None for table in tables) and tokens.num_parameters == 48 + 80
