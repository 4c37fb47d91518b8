"""Adapters of text encoders, and a new word, are those of peft beside a table that is trained."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.mini import build_mini
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables.tokens import LearnedTokens
from fastppt.trainables_config import LoraConfig

MODELS = ["mini-sd", "mini-sdxl", "mini-sd3"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj"]
CPU = torch.device("cpu")


def trained_text(family: Family, vectors: int) -> tuple[LoraAdapters, LearnedTokens]:
    """Adapters and rows that are zero nowhere."""
    config = LoraConfig(rank=3, alpha=5.0)
    adapters = LoraAdapters(
        family.text.make_adaptable(), config, seed=0, device=CPU, dtype=torch.float64
    )
    tokens = LearnedTokens(
        family.text, "<v>", vectors=vectors, init="dog", device=CPU, dtype=torch.float64
    )
    chance = torch.Generator().manual_seed(3)
    for tensor in (*(pair.up for pair in adapters.pairs), *tokens.rows.values()):
        tensor.add_(torch.randn(tensor.shape, generator=chance, dtype=torch.float64))
    return adapters, tokens


def peft_encoders(
    model: str, adapters: LoraAdapters, tokens: LearnedTokens
) -> dict[str, tuple[Any, Any]]:
    """Stock encoders and tokenizers with peft's adapters, and a table with the rows in it."""
    pipeline = build_mini(model)
    encoders = {}
    for component, rows in tokens.rows.items():
        encoder = getattr(pipeline, component).double().requires_grad_(False)
        tokenizer = getattr(pipeline, component.replace("text_encoder", "tokenizer"))
        table = torch.cat([encoder.get_input_embeddings().weight.detach(), rows])
        encoder.set_input_embeddings(nn.Embedding.from_pretrained(table, freeze=False))
        tokenizer.add_tokens(list(tokens.words))
        encoder.add_adapter(peft.LoraConfig(r=3, lora_alpha=5.0, target_modules=PROJECTIONS))
        encoder.get_input_embeddings().weight.requires_grad_(True)
        for pair in adapters.pairs:
            layer = peft_layer(encoder, component, pair.name)
            if layer is not None:
                layer.lora_A["default"].weight.data = pair.down.clone()
                layer.lora_B["default"].weight.data = pair.up.clone()
        encoders[component] = encoder, tokenizer
    return encoders


def peft_layer(encoder: nn.Module, component: str, name: str) -> Any:
    owner, path = name.split(".", 1)
    if owner != component:
        return None
    modules = dict(encoder.named_modules())
    return modules.get(path, modules.get(path.removeprefix("text_model.")))


def loss_of(model: str, hidden: list[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
    """A loss in what the family's network reads: last layer, penultimate layer, pooled text."""
    chance = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    read: list[Tensor] = []
    for number, (last, penultimate, pooled) in enumerate(hidden):
        read.append(last if model == "mini-sd" else penultimate)
        is_pooled = model == "mini-sd3" or (model == "mini-sdxl" and number == len(hidden) - 1)
        if is_pooled:
            assert pooled is not None
            read.append(pooled)
    for tensor in read:
        total = total + (tensor * torch.randn(tensor.shape, generator=chance).double()).sum()
    return total


@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_those_of_peft_and_of_a_whole_table(model: str, vectors: int) -> None:
    family = load_family(ModelConfig(path=model, device="cpu"), dtype=torch.float64)
    adapters, tokens = trained_text(family, vectors)
    prompts = ["a photo of <v> on the beach", "<v> and a <v>", "a dog"]
    expanded = [prompt.replace("<v>", " ".join(tokens.words)) for prompt in prompts]
    theirs = peft_encoders(model, adapters, tokens)
    hidden = []
    for encoder, tokenizer in theirs.values():
        ids = tokenizer(expanded, padding="max_length", return_tensors="pt").input_ids
        output = encoder(ids, output_hidden_states=True)
        pooled = getattr(output, "text_embeds", None)
        hidden.append((output.last_hidden_state, output.hidden_states[-2], pooled))
    their_loss = loss_of(model, hidden)
    their_loss.backward()

    encoded = family.encode_ids(family.prompt_ids(prompts))
    widths = [rows.shape[1] for rows in tokens.rows.values()]
    num_tokens = family.text.num_tokens
    layers = encoded.tokens[:, :num_tokens, : sum(widths)].split(widths, dim=-1)
    pooled_parts: list[Any] = [None] * len(widths)
    if model == "mini-sdxl":
        pooled_parts[-1] = encoded.pooled
    elif model == "mini-sd3":
        pooled_parts = list(encoded.pooled.split(widths, dim=-1))
    our_loss = loss_of(model, [(x, x, p) for x, p in zip(layers, pooled_parts, strict=True)])
    our_loss.backward()
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-9, atol=0)

    gradient = adapters.arena.grad
    num_zero = 0
    for pair in adapters.pairs:
        component = pair.name.partition(".")[0]
        layer = peft_layer(theirs[component][0], component, pair.name)
        for tensor, side in ((pair.down, layer.lora_A), (pair.up, layer.lora_B)):
            ours = gradient.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            wanted = side["default"].weight.grad
            if wanted is None or not wanted.any():
                num_zero += 1
                assert not ours.any()
                continue
            torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max())
    # Where the penultimate layer is read and nothing is pooled, the last layer is read by nobody.
    assert num_zero == (8 if model == "mini-sdxl" else 0)
    for (component, _), tensor in zip(tokens.rows.items(), tokens.arena.tensors, strict=True):
        wanted = theirs[component][0].get_input_embeddings().weight.grad[-vectors:]
        assert wanted.any()
        torch.testing.assert_close(tensor.grad, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max())


def test_messages_name_the_text_adapters_key(family: Family) -> None:
    adapters = LoraAdapters(
        family.text.make_adaptable(),
        LoraConfig(rank=2),
        seed=0,
        device=CPU,
        key="stage.0.trainables.text_encoder_lora",
    )
    weights = {pair.name: (pair.down, pair.up, 1.0) for pair in adapters.pairs}
    name = next(iter(weights))
    weights[name] = (torch.zeros(3, 48), torch.zeros(48, 3), 1.0)
    with pytest.raises(UserError, match=r"set stage.0.trainables.text_encoder_lora.rank to 3"):
        adapters.load(weights)


def test_adapters_in_bf16_compute_with_a_copy_of_float32_masters() -> None:
    family = load_family(ModelConfig(path="mini-sdxl", device="cpu"), dtype=torch.bfloat16)
    adapters = LoraAdapters(family.text.make_adaptable(), LoraConfig(rank=2), seed=0, device=CPU)
    assert adapters.arena.flat.dtype == torch.float32
    assert adapters.arena.working_copy.dtype == torch.bfloat16
    before = family.encode_prompts(["a dog"]).tokens
    for pair in adapters.pairs:
        pair.up.fill_(0.1)
    assert torch.equal(family.encode_prompts(["a dog"]).tokens, before)
    adapters.refresh()
    assert not torch.equal(family.encode_prompts(["a dog"]).tokens, before)
