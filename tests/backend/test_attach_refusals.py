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

    return {
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


WRONG_NETWORKS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "other class": (lambda: nn.Linear(2, 2), {}, "want diffusers' UNet2DConditionModel"),
    "no module": (lambda: "unet", {}, "pass pipeline.unet"),
    "twice": (attached_twice, {}, "is attached to already"),
    "no such layer": (adapted_unet, {"features": ["up.0"]}, "features: 'up.0' matches no layer"),
    "no such attention": (adapted_unet, {"attentions": ["*.attn1"]}, "attentions: .* matches no"),
    "nothing": (adapted_unet, {"features": [], "attentions": []}, "leave one of them out"),
    "negative": (adapted_unet, {"feature_weight": -1.0}, "feature_weight: got -1.0, want"),
    "no number": (adapted_unet, {"attention_weight": float("nan")}, "attention_weight: got nan"),
    "own processor": (with_own_processor, {}, "its processor is a OwnProcessor"),
    "fused": (fused, {}, "unfuse_qkv_projections"),
}


@pytest.mark.parametrize("wrong", WRONG_NETWORKS)
def test_what_cannot_be_attached_to_is_refused(wrong: str) -> None:
    make, settings, message = WRONG_NETWORKS[wrong]
    with pytest.raises(ValueError, match=message):
        attach(make(), **settings)
