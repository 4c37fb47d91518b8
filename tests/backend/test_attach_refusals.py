"""Wrong use of a network that is attached to is refused, with the next thing to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from fastppt.backend import Attached, attach
from tests.backend.foreign_networks import TEXT_TOKENS, Passes, make_passes, step, with_peft


def wrong_uses() -> dict[str, tuple[Callable[[Attached, nn.Module, Passes], object], str]]:
    """What a loop may get wrong, and what it is told."""

    def other_batch(attached: Attached, network: nn.Module, passes: Passes) -> None:
        with attached.base():
            network(**passes.base)
        network(**{name: value[:1] for name, value in passes.tuned.items()})

    def no_tuned_pass(attached: Attached, network: nn.Module, passes: Passes) -> None:
        with attached.base():
            network(**passes.base)
        attached.losses()

    def frozen_tuned_pass(attached: Attached, network: nn.Module, passes: Passes) -> None:
        with attached.base():
            network(**passes.base)
        with torch.no_grad():
            network(**passes.tuned)
        attached.losses()

    def two_tuned_passes(attached: Attached, network: nn.Module, passes: Passes) -> None:
        with attached.base():
            network(**passes.base)
        network(**passes.tuned)
        network(**passes.tuned)

    def read_twice(attached: Attached, network: nn.Module, passes: Passes) -> None:
        step(attached, network, passes)
        attached.losses()

    def empty_base(attached: Attached, network: nn.Module, passes: Passes) -> None:
        with attached.base():
            pass

    def after_a_failed_base(attached: Attached, network: nn.Module, passes: Passes) -> None:
        with pytest.raises(TypeError), attached.base():
            network(**passes.base, unknown=1)
        network(**passes.tuned)
        attached.losses()

    def detached(attached: Attached, network: nn.Module, passes: Passes) -> None:
        attached.detach()
        attached.losses()

    def detached_base(attached: Attached, network: nn.Module, passes: Passes) -> None:
        attached.detach()
        with attached.base():
            network(**passes.base)

    def masked(attached: Attached, network: nn.Module, passes: Passes) -> None:
        with attached.base():
            network(**passes.base, encoder_attention_mask=torch.ones(2, TEXT_TOKENS))

    def wrong_columns(attached: Attached, network: nn.Module, passes: Passes) -> None:
        step(attached, network, passes, torch.arange(3))

    def other_columns(columns: object) -> Callable[[Attached, nn.Module, Passes], object]:
        def use(attached: Attached, network: nn.Module, passes: Passes) -> None:
            step(attached, network, passes, columns)  # type: ignore[arg-type]

        return use

    outside = torch.tensor([0, 1, 2, 3, TEXT_TOKENS])

    return {
        "list": (other_columns([0, 1, 2, 3, 4]), "columns: got list, want an int64 tensor"),
        "fractions": (other_columns(torch.ones(5)), r"got torch.float32 \(5,\), want an int64"),
        "three dimensions": (other_columns(outside.view(1, 1, 5)), r"got torch.int64 \(1, 1, 5\)"),
        "outside": (other_columns(outside), "got 0 to 5, but the base's text has 5 tokens"),
        "below": (other_columns(outside - 2), "got -2 to 3, .* want 0 to 4, or -1 for none"),
        "no pass": (lambda attached, *_: attached.losses(), "there was no base pass"),
        "other batch": (other_batch, "run both on the same noisy latents"),
        "no tuned pass": (no_tuned_pass, "a tuned pass did not reach up_blocks"),
        "frozen tuned pass": (frozen_tuned_pass, "run the network with gradients after"),
        "two tuned passes": (two_tuned_passes, "give each tuned pass a base pass of its own"),
        "read twice": (read_twice, "keep what the first call returned"),
        "empty base": (empty_base, "run the network once inside of attached.base"),
        "failed base": (after_a_failed_base, "there was no base pass"),
        "detached": (detached, "call fastppt.attach"),
        "detached base": (detached_base, "call fastppt.attach"),
        "mask": (masked, "without encoder_attention_mask"),
        "columns": (wrong_columns, r"columns: got shape \(3,\)"),
    }


@pytest.mark.parametrize("use", wrong_uses())
def test_wrong_use_is_refused_with_the_mend(use: str) -> None:
    wrong, message = wrong_uses()[use]
    passes = make_passes()
    network = with_peft(passes.network).network
    attached = attach(network)
    with pytest.raises(ValueError, match=message):
        wrong(attached, network, passes)
    # And the next step is right.
    if not use.startswith("detached"):
        assert step(attached, network, passes)[2].total > 0


@pytest.mark.parametrize("kind", ["unet", "joint"])
def test_texts_of_different_length_need_columns(kind: str) -> None:
    passes = make_passes(kind)
    network = with_peft(passes.network).network
    short = {**passes.base, "encoder_hidden_states": passes.base["encoder_hidden_states"][:, :3]}
    with attach(network) as attached:
        with attached.base():
            network(**short)
        message = r"subject prompt has 5 text tokens and the class prompt 3; .* pass columns="
        with pytest.raises(ValueError, match=message):
            network(**passes.tuned)
        with attached.base(torch.tensor([0, 1, -1, -1, 2])):
            network(**short)
        network(**passes.tuned)
        losses = attached.losses()
        assert losses.attention > 0
        # Nothing is asked of other passes before the backward pass, whatever their text.
        network(**{**passes.tuned, "encoder_hidden_states": short["encoder_hidden_states"]})
        losses.total.backward()


def test_a_checkpointed_backward_after_detaching_is_refused() -> None:
    passes = make_passes()
    network: Any = with_peft(passes.network).network.train()
    attached = attach(network)
    _, _, losses = step(attached, network, passes)
    attached.detach()
    # Without checkpointing it has all that it needs.
    losses.total.backward()
    network.enable_gradient_checkpointing()
    attached = attach(network)
    _, _, losses = step(attached, network, passes)
    attached.detach()
    with pytest.raises(ValueError, match=r"call backward\(\) before detach\(\)"):
        losses.total.backward()


def adapted_unet() -> UNet2DConditionModel:
    network: Any = with_peft(make_passes().network).network
    return network


def fused() -> nn.Module:
    network = make_passes().network
    network.fuse_qkv_projections()
    return with_peft(network, targets=["ff.net.2"]).network


class OwnProcessor(AttnProcessor):
    pass


def with_own_processor() -> nn.Module:
    network = adapted_unet()
    network.set_attn_processor(OwnProcessor())
    return network


def attached_twice() -> nn.Module:
    network = adapted_unet()
    attach(network, attentions=[])
    return network


def with_attention(**parts: Any) -> Callable[[], nn.Module]:
    """A UNet whose aligned attentions do more than project and attend."""

    def make() -> nn.Module:
        network = adapted_unet()
        attn = network.get_submodule("up_blocks.0.attentions.0.transformer_blocks.0.attn2")
        for name, part in parts.items():
            setattr(attn, name, part)
        return network

    return make


EXTRAS: dict[str, Any] = {
    **{name: nn.Identity() for name in ("spatial_norm", "group_norm", "norm_cross")},
    **{name: nn.Identity() for name in ("norm_q", "norm_k")},
    "residual_connection": True,
    "rescale_output_factor": 2.0,
    "scale_qk": False,
}
"""What attentions of diffusers may have and these do not."""

WRONG_NETWORKS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "other class": (lambda: nn.Linear(2, 2), {}, "want diffusers' UNet2DConditionModel"),
    "no module": (lambda: "unet", {}, "pass pipeline.unet"),
    "twice": (attached_twice, {}, "is attached to already"),
    "no such layer": (adapted_unet, {"features": ["up.0"]}, "features: 'up.0' matches no layer"),
    "no such attention": (adapted_unet, {"attentions": ["*.attn1"]}, "attentions: .* matches no"),
    "nothing": (adapted_unet, {"features": [], "attentions": []}, "leave one of them out"),
    "negative": (adapted_unet, {"feature_weight": -1.0}, "feature_weight: got -1.0, want"),
    "no number": (adapted_unet, {"attention_weight": float("nan")}, "attention_weight: got nan"),
    "weight in words": (adapted_unet, {"feature_weight": "1"}, "feature_weight: got '1', want a"),
    "true": (adapted_unet, {"attention_weight": True}, "attention_weight: got True, want a number"),
    "one pattern": (adapted_unet, {"features": "up_blocks.*"}, r"pass a list of .*'up_blocks\.\*'"),
    "columns": (adapted_unet, {"columns": [0, 1]}, "columns: got list, want"),
    **{
        name: (with_attention(**{name: part}), {}, rf"attn2: it has {name}.*attentions=\[")
        for name, part in EXTRAS.items()
    },
    "own processor": (with_own_processor, {}, "its processor is a OwnProcessor"),
    "fused": (fused, {}, "unfuse_qkv_projections"),
}


@pytest.mark.parametrize("wrong", WRONG_NETWORKS)
def test_what_cannot_be_attached_to_is_refused(wrong: str) -> None:
    make, settings, message = WRONG_NETWORKS[wrong]
    with pytest.raises(ValueError, match=message):
        attach(make(), **settings)
