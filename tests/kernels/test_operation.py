"""Operations of torch.library: called directly where nothing looks, and with the same results."""

import pytest
import torch
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fastppt_kernels import (
    adaptive_denoising_loss,
    align_features,
    attention_alignment_loss,
    attention_map_sum,
    feature_alignment_loss,
    feature_statistics,
    joint_attention,
    joint_attention_map_sum,
    operation,
)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


OTHERS = draw(2, 4, 3, 5, seed=1), draw(2, 4, 3, 5, seed=2)


def denoise(prediction):
    emas = torch.tensor([0.5, torch.nan]), torch.tensor([0.4, torch.nan])
    return adaptive_denoising_loss(
        prediction, *OTHERS, torch.tensor([0, 1]), *emas, temperature=0.1
    )


def attend_jointly(qkv):
    return joint_attention(*qkv, num_text_tokens=3, base_map_sum=torch.zeros(2, 6, 3))


# What each public function is called with, and what it computes of that.
CALLS = {
    "attention_map_sum": ((2, 2, 3, 9, 8), lambda qk: attention_map_sum(*qk)),
    "attention_alignment_loss": (
        (2, 2, 3, 9, 8),
        lambda qk: attention_alignment_loss(
            *qk, torch.zeros(2, 9, 9), columns=torch.tensor([*range(8), -1])
        ),
    ),
    "feature_statistics": ((2, 7, 3, 5), feature_statistics),
    "feature_alignment_loss": (
        (2, 7, 3, 5),
        lambda x: feature_alignment_loss(x, torch.zeros(2, 7), torch.ones(2, 7)),
    ),
    "align_features": (
        (2, 7, 3, 5),
        lambda x: align_features(x, torch.zeros(2, 7), torch.ones(2, 7)),
    ),
    "adaptive_denoising_loss": ((2, 4, 3, 5), denoise),
    "joint_attention": ((3, 2, 2, 9, 8), attend_jointly),
    "joint_attention_map_sum": (
        (3, 2, 2, 9, 8),
        lambda qkv: joint_attention_map_sum(*qkv, num_text_tokens=3),
    ),
}
every_call = pytest.mark.parametrize(("shape", "run"), CALLS.values(), ids=CALLS.keys())


def take_a_step(shape, run):
    """Return what a call returns, and the gradient of all of it that has one."""
    leaf = draw(*shape).requires_grad_()
    outputs = run(leaf * 1)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(out.square().sum() for out in outputs if out.requires_grad).backward()
    return [out.detach() for out in outputs], leaf.grad


def ours_among(names):
    return {name for name in names if name.startswith("fastppt_kernels::")}


def profiled(shape, run):
    with profile(activities=[ProfilerActivity.CPU]) as events:
        take_a_step(shape, run)
    return ours_among(event.key for event in events.key_averages())


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@every_call
def test_direct_calls_equal_those_of_the_registered_operations(shape, run, monkeypatch):
    outputs, grad = take_a_step(shape, run)
    monkeypatch.setattr(operation, "is_looked_at", lambda arguments: True)
    wanted, wanted_grad = take_a_step(shape, run)
    for out, want in zip(outputs, wanted, strict=True):
        assert torch.equal(out.nan_to_num(7.0), want.nan_to_num(7.0))
        assert out.stride() == want.stride()
    assert torch.equal(grad, wanted_grad) and grad.any()


@every_call
def test_nothing_is_dispatched_where_nothing_looks(shape, run, monkeypatch):
    assert profiled(shape, run) == set()
    monkeypatch.setattr(operation, "is_looked_at", lambda arguments: True)
    # Forward and backward.
    assert len(profiled(shape, run)) >= 2


@every_call
def test_a_dispatch_mode_sees_operations(shape, run):
    with Seen() as seen:
        take_a_step(shape, run)
    assert len(ours_among(seen.names)) >= 2


@every_call
def test_a_traced_graph_holds_operations(shape, run):
    held = set()

    def note(graph, inputs):
        held.update(str(node.target) for module in graph.modules() for node in module.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(run, backend=note, fullgraph=True)(draw(*shape).requires_grad_())
    assert any(name.startswith("fastppt_kernels.") for name in held), held


def test_what_looks_is_seen():
    class Own(torch.Tensor):
        pass

    plain = torch.ones(3)
    assert not operation.is_looked_at((plain, Parameter(plain), None, 0.5))
    assert operation.is_looked_at((plain, plain.to("meta")))
    assert operation.is_looked_at((plain, plain.as_subclass(Own)))
    with torch._subclasses.FakeTensorMode():
        assert operation.is_looked_at((plain,))
    found = []
    torch.func.vmap(lambda row: found.append(operation.is_looked_at((row,))) or row)(plain)
    assert found == [True]


@pytest.mark.parametrize("name", ["attention_alignment_loss", "feature_statistics"])
def test_results_and_gradients_have_no_history_without_a_graph(name):
    shape, run = CALLS[name]
    with torch.no_grad():
        outputs = run(draw(*shape).requires_grad_())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert not any(out.requires_grad for out in outputs)
    _, grad = take_a_step(shape, run)
    assert not grad.requires_grad


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_is_refused_by_name(name):
    shape, run = CALLS[name]
    leaf = draw(*shape).requires_grad_()
    outputs = run(leaf)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum(out.square().sum() for out in outputs if out.requires_grad)
    (grad,) = torch.autograd.grad(total, leaf, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="cannot be differentiated"):
        grad.sum().backward()
