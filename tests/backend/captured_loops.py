"""Somebody's training loop, plain and captured, and a capture on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastppt.foreign import captured
from fastppt.foreign.captured import CapturedStep
from fastppt.training.graph import Function
from fastppt.training.snapshot import Snapshot
from fastppt_kernels import AnchoredAdamW
from tests.training.replay import ReplayRecorder

WARMUP = 2


class Loop:
    """Somebody's training: a network, an optimizer, a generator, and the step of it."""

    def __init__(
        self, make_optimizer: Callable[..., Any], zero: str = "in place", device: str = "cpu"
    ) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.SiLU(), nn.Linear(5, 3))
        self.network.to(device)
        self.optimizer = make_optimizer(self.network.parameters())
        self.generator = torch.Generator(device).manual_seed(1)
        self.zero = zero
        self.scale = 1.0

    def step(self, batch: dict[str, Tensor], weight: float = 1.0) -> dict[str, Tensor]:
        if self.zero == "before":
            self.optimizer.zero_grad(set_to_none=True)
        target = batch["target"]
        noise = torch.randn(
            target.shape, generator=self.generator, device=target.device, dtype=target.dtype
        )
        prediction = self.network(batch["input"])
        loss = self.scale * weight * (prediction - target - 0.1 * noise).square().mean()
        loss.backward()
        self.optimizer.step()
        if self.zero in ("after", "in place"):
            self.optimizer.zero_grad(set_to_none=self.zero == "after")
        return {"loss": loss, "prediction": prediction}

    def state(self) -> list[Tensor]:
        """All that the training goes on from."""
        tensors = [*self.network.state_dict().values(), self.generator.get_state()]
        for param in self.network.parameters():
            entries = self.optimizer.state[param].values()
            tensors += [entry for entry in entries if isinstance(entry, Tensor)]
        return [tensor.detach().clone() for tensor in tensors]

    def captured(self, **settings: Any) -> CapturedStep:
        state = settings.pop("state", (self.network, self.optimizer))
        generators = settings.pop("generators", (self.generator,))
        given = {"warmup": WARMUP, **settings}
        return CapturedStep(self.step, state=state, generators=generators, **given)


def draw_batch(seed: int, device: str = "cpu", size: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {"input": torch.randn(size, 6, generator=generator)}
    drawn["target"] = torch.randn(size, 3, generator=generator)
    return {name: tensor.to(device) for name, tensor in drawn.items()}


def anchored(params: Any, **options: Any) -> AnchoredAdamW:
    return AnchoredAdamW(params, lr=1e-2, anchor_weight=1e-2, max_grad_norm=0.5, **options)


def sgd(params: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9)


def adamw(params: Any) -> torch.optim.AdamW:
    # `fused` reads no step count on the host, on the CPU too.
    return torch.optim.AdamW(params, lr=1e-2, fused=True, capturable=True)


def are_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class BlindRecorder(ReplayRecorder):
    """As blind as a CUDA graph, and like one it computes nothing when it records."""

    def __init__(self, generators: Sequence[torch.Generator], loops: Sequence[Loop]) -> None:
        super().__init__(generators)
        self._loops = loops

    def record(self, function: Function) -> Callable[[], None]:
        written = [tensor for loop in self._loops for tensor in written_by(loop)]
        snapshot = Snapshot(written, self.generators)
        try:
            return super().record(function)
        finally:
            snapshot.restore()


def written_by(loop: Loop) -> list[Tensor]:
    params = [*loop.network.parameters()]
    moments = [t for p in params for t in loop.optimizer.state[p].values() if isinstance(t, Tensor)]
    gradients = [p.grad for p in params if p.grad is not None]
    return [*params, *loop.network.buffers(), *moments, *gradients]


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[Loop]:
    """Steps of the loops in the list are captured on the CPU, as blindly as on a GPU."""
    loops: list[Loop] = []
    monkeypatch.setattr(captured, "make_recorder", lambda _, given: BlindRecorder(given, loops))
    return loops


@pytest.fixture(params=[False, True], ids=["plain", "captured"])
def loops(request: pytest.FixtureRequest) -> list[Loop]:
    """Steps of the loops in the list run plainly, as on the CPU, and are captured."""
    return request.getfixturevalue("capturing") if request.param else []
