"""A foreign network that is attached to: losses and gradients by their equations, and no traces."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

import fastppt
from fastppt.backend import attach
from fastppt.foreign.recording import FeatureRecorder
from tests.backend.foreign_networks import (
    ADAPTERS,
    NETWORKS,
    TEXT_TOKENS,
    make_passes,
    step,
    with_peft,
)

KINDS = list(NETWORKS)
LAYERS = {
    "unet": (
        [f"up_blocks.{layer}" for layer in ("0.attentions.0", "0.attentions.1")]
        + [f"up_blocks.{layer}" for layer in ("1.resnets.0", "1.resnets.1")],
        [f"up_blocks.0.attentions.{i}.transformer_blocks.0.attn2" for i in range(2)],
    ),
    "joint": (
        ["transformer_blocks.2", "transformer_blocks.3"],
        ["transformer_blocks.2.attn", "transformer_blocks.3.attn"],
    ),
}
LAYERS["joint-qk-norm"] = LAYERS["joint"]
WEIGHTS = {"feature_weight": 0.7, "attention_weight": 0.05}


@dataclass
class Seen:
    """What plain hooks find in one pass, by layer."""

    queries: dict[str, Tensor]
    keys: dict[str, Tensor]
    features: dict[str, Tensor]


def look(network: nn.Module, inputs: dict[str, Tensor], kind: str) -> tuple[Tensor, Seen]:
    """Run a network that nothing is attached to, with hooks on linears and norms."""
    features, attentions = LAYERS[kind]
    outputs: dict[str, Tensor] = {}
    handles = []

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[name] = output

        return hook

    for name in attentions:
        for part in ("q", "k"):
            parts = [f"to_{part}"]
            if kind != "unet":
                parts.append(f"add_{part}_proj")
            if kind == "joint-qk-norm":
                parts = [f"norm_{part}", f"norm_added_{part}"]
            for each in parts:
                path = f"{name}.{each}"
                handles.append(network.get_submodule(path).register_forward_hook(keep(path)))
    for name in features:
        handles.append(network.get_submodule(name).register_forward_hook(keep(name)))
    prediction = network(**inputs).sample
    for handle in handles:
        handle.remove()

    def tokens(name: str, part: str) -> Tensor:
        if kind == "joint-qk-norm":
            return torch.cat(
                [outputs[f"{name}.norm_{part}"], outputs[f"{name}.norm_added_{part}"]], dim=2
            )
        flat = outputs[f"{name}.to_{part}"]
        if kind == "joint":
            flat = torch.cat([flat, outputs[f"{name}.add_{part}_proj"]], dim=1)
        return flat.unflatten(-1, (2, -1)).transpose(1, 2)

    kept: dict[str, Tensor] = {}
    for name in features:
        output: Any = outputs[name]
        if kind == "unet":
            kept[name] = (output[0] if isinstance(output, tuple) else output).flatten(2)
        else:
            kept[name] = output[1].transpose(1, 2)
    queries = {name: tokens(name, "q") for name in attentions}
    return prediction, Seen(queries, {name: tokens(name, "k") for name in attentions}, kept)


def map_sums(query: Tensor, key: Tensor, kind: str) -> Tensor:
    """The maps of image over text tokens, explicit, summed over the heads."""
    maps = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
    if kind != "unet":
        maps = maps[:, :, :-TEXT_TOKENS, -TEXT_TOKENS:]
    return maps.sum(1)


def reference_losses(tuned: Seen, base: Seen, kind: str, columns: list[int]) -> dict[str, Tensor]:
    """The three terms by their equations (arXiv 2507.02687, 4 to 6), weighted."""
    attention, means, stds = [], [], []
    for name, query in tuned.queries.items():
        sums = map_sums(query, tuned.keys[name], kind)
        base_sums = map_sums(base.queries[name], base.keys[name], kind).detach()
        for column, base_column in enumerate(columns):
            if base_column >= 0:
                difference = sums[..., column] - base_sums[..., base_column]
                attention.append(difference.square().sum(1).mean() / query.shape[1])
    for name, values in tuned.features.items():
        old = base.features[name].detach()
        means.append((values.mean(2) - old.mean(2)).square().sum(1).mean())
        std = (values.var(2, unbiased=False) + 1e-6).sqrt()
        old_std = (old.var(2, unbiased=False) + 1e-6).sqrt()
        stds.append((std - old_std).square().sum(1).mean())
    return {
        "attention": WEIGHTS["attention_weight"] * torch.stack(attention).sum(),
        "feature_mean": WEIGHTS["feature_weight"] * torch.stack(means).sum(),
        "feature_std": WEIGHTS["feature_weight"] * torch.stack(stds).sum(),
    }


def close(ours: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> bool:
    return bool((ours - wanted).abs().max() <= tolerance * wanted.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_their_gradients_are_those_of_the_equations(kind: str) -> None:
    passes = make_passes(kind)
    never_adapted = copy.deepcopy(passes.network)
    adapted = with_peft(passes.network)
    network = adapted.network
    columns = [0, 2, -1, 1, 4]
    # As where the text encoder trains too.
    passes.base["encoder_hidden_states"].requires_grad_()
    with torch.no_grad():
        base_prediction, base = look(never_adapted, passes.base, kind)
    prediction, tuned = look(network, passes.tuned, kind)
    terms = reference_losses(tuned, base, kind, columns)
    wanted_loss = prediction.square().mean() + sum(terms.values())
    wanted = torch.autograd.grad(wanted_loss, [*adapted.parameters.values()])

    with attach(network, **WEIGHTS) as attached:
        assert (attached.features, attached.attentions) == LAYERS[kind]
        ours_base, ours, losses = step(attached, network, passes, torch.tensor(columns))
        (ours.square().mean() + losses.total).backward()
    # Joint attention that is looked into rounds as flash attention, in float64 unlike the stock's.
    assert close(ours_base, base_prediction, 1e-12)
    assert not ours_base.requires_grad
    assert close(ours, prediction, 1e-12)
    for name, term in terms.items():
        assert term > 1e-8, name
        assert close(getattr(losses, name), term), name
    for (name, parameter), gradient in zip(adapted.parameters.items(), wanted, strict=True):
        # Of the last block's text query, which nothing reads.
        if gradient.abs().max() > 0:
            assert close(parameter.grad, gradient), name


@pytest.mark.parametrize("kind", ["unet", "joint-qk-norm"])
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_adapters_of_every_kind_have_one_base_pass_and_one_loss(kind: str, adapters: str) -> None:
    passes = make_passes(kind, dtype=torch.float32)
    never_adapted = copy.deepcopy(passes.network)
    with torch.no_grad():
        wanted = never_adapted(**passes.base).sample
    adapted = ADAPTERS[adapters](passes.network)
    with attach(adapted.network) as attached:
        base, tuned, losses = step(attached, adapted.network, passes)
        losses.total.backward()
    assert torch.equal(base, wanted)
    reference = with_peft(make_passes(kind, dtype=torch.float32).network)
    for (_, down, up, _), (_, *values, _) in zip(reference.pairs, adapted.pairs, strict=True):
        down.data.copy_(values[0])
        up.data.copy_(values[1])
    with attach(reference.network) as attached:
        _, their_tuned, theirs = step(attached, reference.network, passes)
    assert close(tuned, their_tuned, 1e-5)
    assert close(losses.total, theirs.total, 1e-4)


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("adapters", ["add_adapter", "sd-scripts", "ours"])
@pytest.mark.parametrize("kind", ["unet", "joint"])
def test_attached_and_detached_networks_are_the_network_bit_for_bit(
    kind: str, adapters: str
) -> None:
    passes = make_passes(kind, dtype=torch.float32)
    adapted = ADAPTERS[adapters](passes.network)
    network = adapted.network
    before, state = network(**passes.tuned).sample, state_of(network)
    entries = [set(vars(module)) for module in network.modules()]
    processors = dict(network.attn_processors)
    flags = [parameter.requires_grad for parameter in network.parameters()]

    def check(prediction: Tensor) -> None:
        assert torch.equal(prediction, before)
        assert [*network.state_dict()] == [*state]
        assert all(torch.equal(value, state[name]) for name, value in state_of(network).items())
        assert [parameter.requires_grad for parameter in network.parameters()] == flags

    attached = attach(network)
    check(network(**passes.tuned).sample)
    _, tuned, losses = step(attached, network, passes)
    check(tuned)
    losses.total.backward()
    # As when pictures are drawn between steps.
    with torch.no_grad():
        check(network(**passes.tuned).sample)
    attached.detach()
    check(network(**passes.tuned).sample)
    assert [set(vars(module)) for module in network.modules()] == entries
    assert all(network.attn_processors[name] is each for name, each in processors.items())
    assert not any(module._forward_hooks for module in network.modules())
    if adapters == "ours":
        assert all(getattr(each, "tap", None) is None for each in processors.values())


@pytest.mark.parametrize("kind", ["unet", "joint"])
def test_what_is_copied_or_pickled_is_not_attached(kind: str) -> None:
    passes = make_passes(kind, dtype=torch.float32)
    network = with_peft(passes.network).network
    with attach(network) as attached:
        _, tuned, losses = step(attached, network, passes)
        for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert torch.equal(other(**passes.tuned).sample, tuned)
            hooks = [hook for module in other.modules() for hook in module._forward_hooks.values()]
            assert not any(isinstance(hook, FeatureRecorder) for hook in hooks)
            with attach(other) as second:
                assert torch.equal(step(second, other, passes)[2].total, losses.total)
        losses.total.backward()


def test_a_copy_of_our_layers_is_not_attached() -> None:
    passes = make_passes("unet", dtype=torch.float32)
    network = ADAPTERS["ours"](passes.network).network
    with attach(network) as attached:
        with attached.base():
            network(**passes.base)
        processors = copy.deepcopy(network.attn_processors)
    assert all(processor.tap is None for processor in processors.values())


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_blocks_give_the_same_losses_and_gradients(kind: str) -> None:
    gradients, totals = [], []
    for is_checkpointed in (False, True):
        passes = make_passes(kind)
        adapted = with_peft(passes.network)
        network = adapted.network.train()
        if is_checkpointed:
            network.enable_gradient_checkpointing()
        with attach(network, **WEIGHTS) as attached:
            # Twice, as with accumulated gradients.
            for _ in range(2):
                _, tuned, losses = step(attached, network, passes)
                (tuned.square().mean() + losses.total).backward()
        totals.append(losses.total.detach())
        gradients.append([p.grad for p in adapted.parameters.values()])
    assert torch.equal(*totals)
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_a_checkpointed_backward_after_another_base_pass_is_refused() -> None:
    passes = make_passes()
    network = with_peft(passes.network).network.train()
    with attach(network) as attached:
        _, _, first = step(attached, network, passes)
        _, _, second = step(attached, network, passes)
        # Without checkpointing both have all that they need.
        (first.total + second.total).backward()
        network.enable_gradient_checkpointing()
        _, _, first = step(attached, network, passes)
        step(attached, network, passes)
        with pytest.raises(ValueError, match=r"call backward\(\) before the next attached\.base"):
            first.total.backward()


def test_reentrant_checkpoints_are_refused_with_the_reason() -> None:
    passes = make_passes("joint")
    network = with_peft(passes.network).network.train()
    network.enable_gradient_checkpointing(
        lambda block, *given: torch.utils.checkpoint.checkpoint(block, *given, use_reentrant=True)
    )
    with attach(network) as attached:
        with attached.base():
            network(**passes.base)
        network(**passes.tuned)
        with pytest.raises(ValueError, match="use_reentrant=False"):
            attached.losses()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_gives_the_losses_within_its_rounding(kind: str) -> None:
    totals, gradients = [], []
    for is_rounded in (False, True):
        passes = make_passes(kind, dtype=torch.float32)
        adapted = with_peft(passes.network)
        network = adapted.network
        with attach(network, **WEIGHTS) as attached:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_rounded):
                _, tuned, losses = step(attached, network, passes)
            assert losses.total.dtype == torch.float32
            (tuned.float().square().mean() + losses.total).backward()
        totals.append(losses.total.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in adapted.parameters.values()]))
    assert close(totals[1], totals[0], 0.05)
    cosine = torch.cosine_similarity(*gradients, dim=0)
    assert cosine > 0.99


def test_either_kind_of_layer_can_be_left_out_or_chosen_by_pattern() -> None:
    passes = make_passes()
    network = with_peft(passes.network).network
    with attach(network) as attached:
        _, _, both = step(attached, network, passes)
    with attach(network, features=[]) as attached:
        _, _, losses = step(attached, network, passes)
    assert attached.features == []
    assert torch.equal(losses.attention, both.attention)
    assert float(losses.feature_mean) == float(losses.feature_std) == 0.0
    with attach(network, features=["mid_block.*", "up_blocks.1.*.0"], attentions=[]) as attached:
        _, _, losses = step(attached, network, passes)
    assert set(attached.features) > {"mid_block.attentions.0", "up_blocks.1.resnets.0"}
    assert not any(name.startswith("down_blocks") for name in attached.features)
    assert attached.attentions == []
    assert float(losses.attention) == 0.0 < float(losses.feature_mean)


def test_columns_of_attach_serve_every_pass_that_brings_none() -> None:
    passes = make_passes()
    network = with_peft(passes.network).network
    columns = torch.tensor([1, 0, 2, -1, 4])
    with attach(network) as attached:
        _, _, wanted = step(attached, network, passes, columns)
        _, _, plain = step(attached, network, passes)
    with attach(network, columns=columns) as attached:
        _, _, ours = step(attached, network, passes)
    assert torch.equal(ours.attention, wanted.attention)
    assert not torch.equal(ours.attention, plain.attention)


def test_a_processor_that_computes_otherwise_is_looked_into_and_put_back() -> None:
    passes = make_passes()
    network = with_peft(passes.network).network
    with attach(network) as attached:
        _, _, wanted = step(attached, network, passes)
    processor = AttnProcessor()
    network.set_attn_processor(processor)
    mask = torch.tensor([[1.0] * 4 + [0.0]] * 2, dtype=torch.float64)
    masked = network(**passes.tuned, encoder_attention_mask=mask).sample
    with attach(network) as attached:
        # It still does what nobody looks at.
        assert torch.equal(network(**passes.tuned, encoder_attention_mask=mask).sample, masked)
        _, _, losses = step(attached, network, passes)
        with torch.no_grad():
            assert torch.equal(network(**passes.tuned, encoder_attention_mask=mask).sample, masked)
    assert close(losses.total, wanted.total)
    assert {id(each) for each in network.attn_processors.values()} == {id(processor)}


def test_passes_that_are_asked_nothing_of_are_not_looked_at() -> None:
    passes = make_passes()
    adapted = with_peft(passes.network)
    network = adapted.network
    with attach(network) as attached:
        _, tuned, losses = step(attached, network, passes)
        # Another batch with gradients, such as that of class images.
        other = {name: value[:1] for name, value in passes.tuned.items()}
        assert close(network(**other).sample, tuned[:1], 1e-12)
        assert torch.equal(network(**passes.tuned).sample, tuned)
        losses.total.backward()
        gradients = [parameter.grad.clone() for parameter in adapted.parameters.values()]
        for parameter in adapted.parameters.values():
            parameter.grad = None
        step(attached, network, passes)[2].total.backward()
    for gradient, parameter in zip(gradients, adapted.parameters.values(), strict=True):
        assert torch.equal(gradient, parameter.grad)


def test_the_face_is_reached_from_the_package() -> None:
    assert fastppt.attach is attach
    assert {"attach", "CapturedStep", "OverfittingIndicator"} <= {*fastppt.__all__}
    with pytest.raises(AttributeError, match="no attribute 'attached'"):
        fastppt.attached  # noqa: B018
