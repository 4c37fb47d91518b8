"""The network goes on with features whose gradient the losses are added to in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastppt.config import RunConfig
from fastppt.objectives.feature_alignment import FeatureHook
from fastppt.training.step import accumulate_gradients
from fastppt_kernels.feature_alignment.launch import lies_like
from tests.training.objective_steps import OBJECTIVES, load, prepared

MakeConfig = Callable[..., RunConfig]
FEATURES = {f"{OBJECTIVES}.feature_alignment.weight": 30.0}


class Backwards(TorchDispatchMode):
    """Notes the features of each backward pass of the losses, and what flowed into them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.fastppt_kernels.feature_backward.default:
            self.seen.append((args[0], args[7] if len(args) > 7 else None))
        return func(*args, **(kwargs or {}))


def backwards_of_a_pass(make_config: MakeConfig, model: str) -> tuple[int, Backwards]:
    """Return the number of aligned layers, and what a pass with them did."""
    settings = FEATURES | {"model.path": model, "stage.0.batch_size": 2}
    step, _ = prepared(make_config("lora", **settings), load(model))
    assert step.feature_alignment is not None
    with Backwards() as backwards:
        accumulate_gradients(step)
    return len(step.feature_alignment._tuned), backwards


@pytest.mark.parametrize("model", ["mini-sd", "mini-sdxl", "mini-sd3"])
def test_every_layer_adds_its_losses_gradient_to_what_flows_in(
    make_config: MakeConfig, model: str
) -> None:
    num_layers, backwards = backwards_of_a_pass(make_config, model)
    assert len(backwards.seen) == num_layers > 0
    for features, incoming in backwards.seen:
        assert incoming is not None and incoming.any()
        # A GPU reads it where it is.
        assert lies_like(incoming, torch.empty_like(features))


def test_a_hook_that_only_looks_is_seen(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = FeatureHook.__call__

    def planted(self: FeatureHook, *given: Any) -> None:
        right(self, *given)

    monkeypatch.setattr(FeatureHook, "__call__", planted)
    _, backwards = backwards_of_a_pass(make_config, "mini-sdxl")
    assert all(incoming is None for _, incoming in backwards.seen)


@pytest.mark.parametrize("model", ["mini-sdxl", "mini-sd3"])
def test_features_are_put_where_they_are_found(model: str) -> None:
    family = load(model)
    old, new, text = torch.zeros(2), torch.ones(2), torch.full((2,), 2.0)
    outputs: list[Any] = [(text, old)] if model == "mini-sd3" else [old, (old,)]
    for output in outputs:
        replaced = family.with_features(output, new)
        assert type(replaced) is type(output)
        assert family.features_of(replaced) is new
    if model == "mini-sd3":
        assert replaced[0] is text
