"""The GPU in thought refuses what a GPU refuses, one planted fault at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import triton
from torch import Tensor

from tests.imagined_gpu import ImaginedGPU
from tests.imagined_places import RefusedError


@pytest.fixture
def gpu() -> Iterator[ImaginedGPU]:
    with ImaginedGPU() as imagined:
        yield imagined


def on_gpu() -> Tensor:
    return torch.ones(3, device="cuda", requires_grad=True)


def test_tensors_say_where_they_are_and_what_comes_of_them_says_it_too(gpu: ImaginedGPU) -> None:
    param, index = on_gpu(), torch.tensor([0, 2], device="cuda")
    total = (param[index] * 2).sum()
    total.backward()
    assert param.grad is not None
    for tensor in (param, index, total, param.grad, param.detach().double(), param.to("cuda:0")):
        assert tensor.is_cuda and tensor.device == torch.device("cuda:0")
    assert param.to("cuda") is param
    assert not param.cpu().is_cuda and torch.zeros(2).device.type == "cpu"
    assert torch.zeros(2).pin_memory().is_pinned()
    assert param.grad.tolist() == [2.0, 0.0, 2.0]


def test_the_gpu_is_gone_afterwards() -> None:
    before = torch.cuda.is_available, torch.ones, Tensor.to, torch.Generator
    with ImaginedGPU():
        tensor = on_gpu()
        assert torch.cuda.is_available is not before[0]
    assert (torch.cuda.is_available, torch.ones, Tensor.to, torch.Generator) == before
    assert tensor.device.type == "cpu"


MIXES: dict[str, Callable[[], object]] = {
    "a sum": lambda: on_gpu() + torch.ones(3),
    "a product in the backward pass": lambda: Late.apply(on_gpu()).sum().backward(),
    "a product in place": lambda: torch.ones(3, device="cuda").mul_(torch.ones(3)),
    "a table in host memory": lambda: torch.ones(3)[torch.zeros(1, dtype=int, device="cuda")],
}


class Late(torch.autograd.Function):
    """Mixes in its backward pass alone."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * torch.ones(3)


@pytest.mark.parametrize("mix", MIXES)
def test_gpu_and_host_memory_do_not_mix(gpu: ImaginedGPU, mix: str) -> None:
    with pytest.raises(RefusedError, match="in one op"):
        MIXES[mix]()


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": Tensor.item,
    "bool": lambda values: bool(values[0] > 0),
    "tolist": lambda values: values.tolist(),
    "cpu": lambda values: values.cpu(),
    "cpu, not awaited": lambda values: values.to("cpu", non_blocking=True),
    "into host memory": lambda values: torch.zeros(3).copy_(values),
    "from host memory": lambda values: values.copy_(torch.zeros(3)),
    "into pinned memory, awaited": lambda values: torch.zeros(3, pin_memory=True).copy_(values),
    "from numbers": lambda values: torch.tensor([1.0], device="cuda"),
    "nonzero": lambda values: values.nonzero(),
    "a mask": lambda values: values[values > 0],
    "an index in host memory": lambda values: values[torch.tensor([0])],
    "unique": lambda values: values.unique(),
    "repetitions": lambda values: values.repeat_interleave(values.long()),
    "synchronize": lambda values: torch.cuda.synchronize(),
    "an event": lambda values: torch.cuda.Event().synchronize(),
}


@pytest.mark.parametrize("what", WAITS)
def test_a_step_must_not_wait(gpu: ImaginedGPU, what: str) -> None:
    values = on_gpu().detach() if what != "item" else on_gpu().sum().detach()
    WAITS[what](values)
    assert gpu.waits.total() > 0
    with pytest.raises(RefusedError), gpu.step():
        WAITS[what](values)


def test_a_step_may_copy_between_pinned_memory_and_the_gpu(gpu: ImaginedGPU) -> None:
    values, host = on_gpu().detach(), torch.zeros(3, pin_memory=True)
    with gpu.step():
        host.copy_(values, non_blocking=True)
        host.to("cuda", non_blocking=True)
        torch.zeros(3, device="cuda").add_(values, alpha=2.0)
    assert gpu.waits.total() == 0


def test_a_step_holds_no_number_of_host_memory(gpu: ImaginedGPU) -> None:
    values, rate = on_gpu().detach(), torch.tensor(0.1)
    values * rate
    with pytest.raises(RefusedError, match="in one op"), gpu.step():
        values * rate


def test_a_step_draws_with_its_own_generators(gpu: ImaginedGPU) -> None:
    own, other = torch.Generator("cuda"), torch.Generator("cuda")
    with gpu.step(own):
        torch.randn(2, generator=own, device="cuda")
        with pytest.raises(RefusedError, match="not the step's"):
            torch.rand(2, device="cuda")
        for foreign in (other, None):
            with pytest.raises(RefusedError, match="not the step's"):
                on_gpu().detach().normal_(generator=foreign)
    with pytest.raises(RefusedError, match="generator of the CPU"):
        on_gpu().detach().normal_(generator=torch.Generator())


@triton.jit
def nothing_kernel(values_ptr, size):
    pass


def test_a_launch_takes_tensors_of_the_gpu(gpu: ImaginedGPU) -> None:
    nothing_kernel[(2,)](on_gpu(), 3)
    assert gpu.launches[0][:2] == ("nothing_kernel", (2,))
    assert gpu.launches[0][2] == {"values_ptr": (torch.float32, (3,)), "size": 3}
    with pytest.raises(RefusedError, match="values_ptr is in host memory"):
        nothing_kernel[(2,)](torch.ones(3), 3)


def test_streams_are_to_wait_for_one_another(gpu: ImaginedGPU) -> None:
    values, side = on_gpu().detach(), torch.cuda.Stream()
    home = torch.cuda.current_stream()
    values.add_(1)
    with torch.cuda.stream(side), pytest.raises(RefusedError, match="another stream"):
        values.clone()
    side.wait_stream(home)
    with torch.cuda.stream(side):
        values.clone()
    with pytest.raises(RefusedError, match="another stream"):
        values.add_(1)
    home.wait_event(side.record_event())
    values.add_(1)


def test_the_host_is_to_wait_for_what_was_copied(gpu: ImaginedGPU) -> None:
    values, host, copied = on_gpu().detach(), torch.zeros(3, pin_memory=True), torch.cuda.Event()
    host.copy_(values, non_blocking=True)
    copied.record()
    with pytest.raises(RefusedError, match="another stream"):
        host.tolist()
    copied.synchronize()
    assert host.tolist() == [1.0, 1.0, 1.0]


def test_a_replay_touches_what_was_captured(gpu: ImaginedGPU) -> None:
    values, side = on_gpu().detach(), torch.cuda.Stream()
    home, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, None, side):
        values.add_(1)
        with pytest.raises(RefusedError, match="waits"):
            values.cpu()
    graph.replay()
    with torch.cuda.stream(side):
        with pytest.raises(RefusedError, match="another stream"):
            values.clone()
        side.wait_stream(home)
        values.clone()
    assert (gpu.num_captures, gpu.num_replays) == (1, 1)
