"""Prompts encoded from ids, in the step, are what the stock pipelines make of the same prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.base import Family, PromptEmbeddings
from fastppt.families.loading import load_family
from fastppt.families.pipeline import PROMPTS_A_PASS
from fastppt.mini import build_mini
from fastppt.mini.tokenizer import MODEL_MAX_LENGTH
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables.tokens import LearnedTokens
from fastppt.trainables_config import LoraConfig
from fastppt_kernels.testing import ForbidHostReads

MODELS = ["mini-sd", "mini-sdxl", "mini-sd3"]
CPU = torch.device("cpu")
PROMPTS = ["a photo of sks dog", "a sketch of a boat " + "in the snow " * 9, ""]


def load(model: str, dtype: torch.dtype | None = None, **keys: object) -> Family:
    return load_family(ModelConfig(path=model, device="cpu", **keys), dtype=dtype)


def teach(family: Family, vectors: int = 2, word: str = "<v>", **keys: Any) -> LearnedTokens:
    """A new word whose rows are no known word's."""
    tokens = LearnedTokens(
        family.text, word, vectors=vectors, init="dog", device=family.device, **keys
    )
    chance = torch.Generator().manual_seed(5)
    for row in tokens.rows.values():
        row.add_(torch.randn(row.shape, generator=chance).to(row.dtype))
    tokens.refresh()
    return tokens


def are_equal(ours: PromptEmbeddings, theirs: PromptEmbeddings) -> bool:
    pooled = ours.pooled is theirs.pooled is None or torch.equal(ours.pooled, theirs.pooled)
    return torch.equal(ours.tokens, theirs.tokens) and pooled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("model", MODELS)
def test_prompts_from_ids_are_the_stock_pipelines_bit_for_bit(
    model: str, dtype: torch.dtype
) -> None:
    family = load(model, dtype)
    teach(family)
    prompts = [*PROMPTS, "a photo of <v> on the beach", "<v> and <v>"]
    ids = family.prompt_ids(prompts)
    assert are_equal(family.encode_ids(ids), family.encode_prompts(prompts))
    rows = torch.tensor([3, 0])
    assert torch.equal(ids[rows].clips["text_encoder"], ids.clips["text_encoder"][rows])
    assert family.encode_ids(ids[rows]).tokens.shape[0] == 2


@pytest.mark.parametrize("large", [True, False])
def test_a_dropped_t5_has_no_tokens(large: bool) -> None:
    family = load("mini-sd3", large_text_encoder=large)
    ids = family.prompt_ids(PROMPTS)
    assert (ids.others is not None) == large
    assert are_equal(family.encode_ids(ids), family.encode_prompts(PROMPTS))


@pytest.mark.parametrize("model", MODELS)
def test_the_negative_prompt_from_ids_is_the_stock_one(model: str) -> None:
    family = load(model)
    ids = family.negative_ids()
    if model == "mini-sdxl":
        assert ids is None and not family.encode_negative().tokens.any()
    else:
        assert are_equal(family.encode_ids(ids), family.encode_negative())


@pytest.mark.parametrize("model", MODELS)
def test_encoding_ids_reads_nothing_on_the_host(model: str) -> None:
    family = load(model)
    teach(family)
    LoraAdapters(family.text.make_adaptable(), LoraConfig(rank=2), seed=0, device=CPU)
    ids = family.prompt_ids(["a photo of <v>"])
    with ForbidHostReads():
        encoded = family.encode_ids(ids)
        encoded.tokens.sum().backward()


def stock_with_embedding(model: str, tokens: LearnedTokens, prompt: str) -> PromptEmbeddings:
    """What a stock pipeline computes that has the word's embeddings loaded."""
    pipeline: Any = build_mini(model)
    for component, rows in tokens.rows.items():
        encoder = getattr(pipeline, component)
        tokenizer = getattr(pipeline, component.replace("text_encoder", "tokenizer"))
        if hasattr(pipeline, "load_textual_inversion"):
            pipeline.load_textual_inversion(
                rows, token=tokens.word, text_encoder=encoder, tokenizer=tokenizer
            )
            continue
        tokenizer.add_tokens(list(tokens.words))
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        ids = tokenizer.convert_tokens_to_ids(list(tokens.words))
        encoder.get_input_embeddings().weight.data[ids] = rows
    with torch.no_grad():
        if model == "mini-sd":
            return PromptEmbeddings(pipeline.encode_prompt(prompt, CPU, 1, False)[0], None)
        if model == "mini-sdxl":
            encoded = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        else:
            expanded = prompt.replace(tokens.word, " ".join(tokens.words))
            encoded = pipeline.encode_prompt(
                expanded,
                expanded,
                prompt,
                do_classifier_free_guidance=False,
                max_sequence_length=MODEL_MAX_LENGTH,
            )
    return PromptEmbeddings(encoded[0], encoded[2])


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_a_new_word_means_what_it_means_in_stock_diffusers(model: str, vectors: int) -> None:
    family = load(model)
    prompt = "a photo of <v> on the beach"
    plain = family.encode_prompts(["a photo of dog on the beach"])
    tokens = teach(family, vectors)
    ours = family.encode_prompts([prompt])
    assert are_equal(ours, stock_with_embedding(model, tokens, prompt))
    assert not torch.equal(ours.tokens, plain.tokens)


def old_eos(family: Family) -> None:
    """The published models' configurations: transformers then pools at the highest id."""
    for clip in family.text.clips.values():
        getattr(clip, "text_model", clip).eos_token_id = 2


@pytest.mark.parametrize("model", ["mini-sdxl", "mini-sd3"])
def test_published_models_pool_a_prompt_at_its_new_word(model: str) -> None:
    """So what follows the word is not in the pooled text, in stock diffusers as here."""
    pooled = []
    for is_old in (False, True):
        family = load(model)
        teach(family)
        if is_old:
            old_eos(family)
        for ending in ("beach", "snow"):
            encoded = family.encode_ids(family.prompt_ids([f"a photo of <v> on the {ending}"]))
            pooled.append(encoded.pooled)
    assert not torch.equal(pooled[0], pooled[1])
    assert torch.equal(pooled[2], pooled[3])


@pytest.mark.parametrize("model", MODELS)
def test_adapters_that_do_nothing_change_nothing(model: str) -> None:
    family = load(model, torch.float64)
    before = family.encode_prompts(PROMPTS).tokens
    names = [name for name, _ in named_parameters(family)]
    groups = family.text.make_adaptable()
    adapters = LoraAdapters(groups, LoraConfig(rank=2), seed=0, device=CPU, dtype=torch.float64)
    after = family.encode_prompts(PROMPTS).tokens
    assert (after - before).abs().max() <= 1e-12
    assert [name for name, _ in named_parameters(family)] == names
    for pair in adapters.pairs:
        pair.up.fill_(0.1)
    assert (family.encode_prompts(PROMPTS).tokens - before).abs().max() > 1e-3
    with family.text.base():
        assert torch.equal(family.encode_prompts(PROMPTS).tokens, after)


def named_parameters(family: Family) -> list[tuple[str, Tensor]]:
    return [
        (f"{component}.{name}", parameter)
        for component, clip in family.text.clips.items()
        for name, parameter in clip.named_parameters()
    ]


@pytest.mark.parametrize("model", MODELS)
def test_projections_are_named_as_files_name_them(model: str) -> None:
    family = load(model)
    names = [name for group in family.text.make_adaptable() for name in group.names]
    assert names[:4] == [
        f"text_encoder.text_model.encoder.layers.0.self_attn.{part}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj")
    ]
    assert len(names) == len(set(names)) == 8 * len(family.text.clips)


@pytest.mark.parametrize("model", MODELS)
def test_what_has_a_place_for_an_adapter_has_a_gradient_and_the_rest_has_none(model: str) -> None:
    family = load(model, torch.float64)
    adapters = LoraAdapters(family.text.make_adaptable(), LoraConfig(rank=1), seed=0, device=CPU)
    for pair in adapters.pairs:
        pair.up.fill_(0.1)
    encoded = family.encode_ids(family.prompt_ids(["a photo of a dog"]))
    total = encoded.tokens.square().sum()
    total = total if encoded.pooled is None else total + encoded.pooled.square().sum()
    total.backward()
    unread = set()
    for pair in adapters.pairs:
        start = pair.up.storage_offset() - adapters.arena.flat.storage_offset()
        if not adapters.arena.grad[start : start + pair.up.numel()].any():
            unread.add(pair.name)
    ours = {name for name in family.unread_projections if name.startswith("text_encoder")}
    assert unread == ours
    assert len(ours) == (4 if model == "mini-sdxl" else 0)
    again = load(model)
    groups = again.text.make_adaptable(again.unread_projections)
    named = {name for group in groups for name in group.names}
    assert named == {pair.name for pair in adapters.pairs} - ours


def test_projections_of_one_input_are_computed_at_once_and_not_kept(family: Family) -> None:
    joint, out = family.text.make_adaptable()[:2]
    calls: list[int] = []
    for group in (joint, out):
        group.linears[0].register_forward_hook(lambda *_: calls.append(0))
    family.encode_prompts(["a dog"])
    assert len(calls) == 2
    shared = [
        module._shared
        for clip in family.text.clips.values()
        for module in clip.modules()
        if hasattr(module, "_shared")
    ]
    assert len(shared) == 4 * 2 * 2
    assert all(each._inputs is None and not each._outputs for each in shared)


@pytest.mark.parametrize("vectors", [1, 2])
def test_prompts_are_counted_as_they_are_read(family: Family, vectors: int) -> None:
    plain = family.token_blocks("a photo of dog")[0].ids
    teach(family, vectors)
    read = family.token_blocks("a photo of <v>")[0].ids
    assert len(read) == len(plain) + vectors - 1
    assert family.text.has_new_word("a photo of <v>") and not family.text.has_new_word("a dog")
    long = "red " * (MODEL_MAX_LENGTH - 2 - vectors)
    assert family.truncated_text(f"{long}<v>") is None
    assert family.truncated_text(f"{long}red <v>") is not None


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("sks", "'sks' is a word that the model knows already.*'<my-sks>'"),
        ("<|endoftext|>", "knows already"),
        ("a<v> b", "no spaces"),
        ("<Dog>", "in lower case; write '<dog>' for '<Dog>'"),
    ],
)
def test_words_that_cannot_be_new_are_refused(family: Family, word: str, what: str) -> None:
    before = len(family.token_blocks("a <v>")[0].ids)
    with pytest.raises(UserError, match=f"prompts.token: .*{what}"):
        teach(family, word=word)
    assert len(family.token_blocks("a <v>")[0].ids) == before


def test_a_word_is_taught_once(family: Family) -> None:
    teach(family)
    for word in ("<v>", "<v>_1"):
        with pytest.raises(UserError, match="knows already"):
            teach(family, word=word)


def test_kept_text_encoders_encode_on_and_the_rest_is_freed() -> None:
    family = load("mini-sd3")
    ids = family.prompt_ids(PROMPTS)
    before = family.encode_ids(ids)
    clips = sum(p.nbytes for _, p in named_parameters(family))
    family.release_encoders(keep_text=True)
    assert are_equal(family.encode_ids(ids), before)
    assert clips <= family.weight_bytes()["text encoders"] <= clips * 1.01
    family.release_encoders()
    assert family.weight_bytes()["text encoders"] == 0 and not family.text.clips


def test_a_text_encoder_that_is_told_of_padding_cannot_move() -> None:
    family = load("mini-sd")
    family._pipeline.text_encoder.config.use_attention_mask = True
    with pytest.raises(UserError, match="use_attention_mask"):
        family.prompt_ids(PROMPTS)


@pytest.mark.parametrize("model", MODELS)
def test_many_prompts_are_encoded_a_few_at_a_time(model: str) -> None:
    family = load(model)
    taken: list[int] = []
    for clip in family.text.clips.values():
        clip.register_forward_pre_hook(lambda _, inputs: taken.append(len(inputs[0])))
    prompts = [f"a photo of dog {number}" for number in range(2 * PROMPTS_A_PASS + 3)]
    many = family.encode_prompts(prompts)
    assert set(taken) == {PROMPTS_A_PASS, 3}
    starts = range(0, len(prompts), PROMPTS_A_PASS)
    few = [family.encode_prompts(prompts[start : start + PROMPTS_A_PASS]) for start in starts]
    assert torch.equal(many.tokens, torch.cat([part.tokens for part in few]))
    if many.pooled is not None:
        assert torch.equal(many.pooled, torch.cat([part.pooled for part in few]))
    for part in family.prompt_ids(prompts).tensors:
        assert len(part) == len(prompts)
