"""Compiled networks that are attached to give the losses and gradients of eager ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from fastppt.backend import attach
from tests.backend.foreign_networks import ADAPTERS, Passes, make_passes, with_peft

pytestmark = pytest.mark.slow


def compile_whole(network: nn.Module, backend: str) -> nn.Module:
    outer: nn.Module = torch.compile(network, backend=backend)
    return outer


def compile_blocks(network: nn.Module, backend: str) -> nn.Module:
    for module in network.modules():
        if type(module).__name__ in ("BasicTransformerBlock", "JointTransformerBlock"):
            module.compile(backend=backend)
    return network


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    # Code that gave up would run eagerly, and the tests would compare eager with eager.
    with torch._dynamo.config.patch(
        recompile_limit=32,
        fail_on_recompile_limit_hit=True,
        # As torch has it; fastppt's own engine, in other tests of the process, looks at hooks.
        skip_nnmodule_hook_guards=True,
    ):
        yield
    torch.compiler.reset()


def steps(
    outer: nn.Module, passes: Passes, parameters: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Losses of two steps on different batches, a pass without gradients between; gradients."""
    totals = []
    with attach(outer, feature_weight=0.7, attention_weight=0.05) as attached:
        for index in range(2):
            with attached.base():
                base = outer(**passes.base).sample
            tuned = outer(**{**passes.tuned, "timestep": passes.tuned["timestep"] + index}).sample
            losses = attached.losses()
            loss = (tuned - base).square().mean()
            totals += [losses.attention, losses.feature_mean, losses.feature_std, loss]
            (loss + losses.total).backward()
            with torch.no_grad():
                totals.append(outer(**passes.tuned).sample.sum())
    totals.append(outer(**passes.tuned).sample.sum())
    gradients = [p.grad for p in parameters]
    return [total.detach() for total in totals], gradients


def assert_same(ours: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(ours, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-9 * other.abs().max()


@pytest.mark.parametrize(
    ("kind", "compile_by", "backend", "adapters"),
    [
        ("joint", compile_whole, "aot_eager", "add_adapter"),
        ("unet", compile_whole, "eager", "OneTrainer"),
        ("unet", compile_blocks, "eager", "sd-scripts"),
    ],
)
def test_compiled_passes_equal_eager_ones(
    kind: str,
    compile_by: Callable[[nn.Module, str], nn.Module],
    backend: str,
    adapters: str,
) -> None:
    results = []
    for is_compiled in (False, True):
        passes = make_passes(kind)
        adapted = ADAPTERS[adapters](passes.network)
        outer = compile_by(adapted.network, backend) if is_compiled else adapted.network
        results.append(steps(outer, passes, [*adapted.parameters.values()]))
    (eager_totals, eager_gradients), (totals, gradients) = results
    assert all(total.abs() > 1e-8 for total in eager_totals)
    assert_same(totals, eager_totals)
    assert_same(gradients, eager_gradients)


def test_compiled_and_checkpointed_passes_equal_eager_ones() -> None:
    results = []
    for is_compiled in (False, True):
        passes = make_passes("joint")
        adapted = with_peft(passes.network)
        network = adapted.network.train()
        if is_compiled:
            network.enable_gradient_checkpointing()
            network = compile_blocks(network, "aot_eager")
        results.append(steps(network, passes, [*adapted.parameters.values()]))
    assert_same(results[1][0], results[0][0])
    assert_same(results[1][1], results[0][1])


def test_a_network_that_ran_compiled_is_refused_where_its_code_has_no_hooks() -> None:
    passes = make_passes("joint")
    outer = compile_whole(with_peft(passes.network).network, "eager")
    outer(**passes.tuned)
    with attach(outer, attentions=[]) as attached:
        with attached.base():
            outer(**passes.base)
        outer(**passes.tuned)
        with pytest.raises(ValueError, match=r"torch\.compiler\.reset"):
            attached.losses()
        torch.compiler.reset()
        with attached.base():
            outer(**passes.base)
        outer(**passes.tuned)
        assert attached.losses().total > 0
