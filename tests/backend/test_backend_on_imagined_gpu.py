"""On a GPU in thought another trainer's step is captured with all that we bring into it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastppt.backend import CapturedStep, OverfittingIndicator, attach
from fastppt_kernels import AnchoredAdamW
from tests.backend.foreign_networks import ADAPTERS, make_passes
from tests.imagined_gpu import ImaginedGPU
from tests.imagined_places import DEVICE

WARMUP, CALLS = 2, 5


@pytest.mark.parametrize(
    ("kind", "adapters"),
    [
        ("unet", "sd-scripts"),
        ("joint", "add_adapter"),
        pytest.param("unet", "add_adapter", marks=pytest.mark.slow),
        pytest.param("joint", "sd-scripts", marks=pytest.mark.slow),
    ],
)
def test_a_step_with_alignments_indicator_and_anchor_is_captured_whole(
    kind: str, adapters: str
) -> None:
    with ImaginedGPU() as gpu:
        passes = make_passes(kind, dtype=torch.float32)
        adapted = ADAPTERS[adapters](passes.network)
        network = adapted.network.to(DEVICE)
        for param in adapted.parameters.values():
            param.data = param.data.to(DEVICE)
        base, tuned = (
            {name: tensor.to(DEVICE) for name, tensor in asked.items()}
            for asked in (passes.base, passes.tuned)
        )
        pairs = [(down, up, scale) for _, down, up, scale in adapted.pairs]
        optimizer = AnchoredAdamW(
            [{"params": [*adapted.parameters.values()], "lora_pairs": pairs}],
            lr=torch.tensor(1e-3, device=DEVICE),
            anchor_weight=0.1,
            form="effective",
            max_grad_norm=1.0,
        )
        indicator = OverfittingIndicator(device=DEVICE)
        generator = torch.Generator(DEVICE).manual_seed(0)
        attached = attach(network)
        sample = "sample" if kind == "unet" else "hidden_states"

        def step(latents: Tensor, timesteps: Tensor) -> Tensor:
            noise = torch.randn(latents.shape, generator=generator, device=DEVICE)
            asked = {sample: latents + noise, "timestep": timesteps}
            with attached.base():
                base_prediction = network(**(base | asked)).sample
            prediction = network(**(tuned | asked)).sample
            loss = indicator.loss(prediction, base_prediction, noise, timesteps)
            loss = loss + attached.losses().total
            loss.backward()
            optimizer.step(skip_non_finite=True)
            optimizer.zero_grad(set_to_none=False)
            return loss

        captured = CapturedStep(
            step, state=(network, optimizer, indicator), generators=[generator], warmup=WARMUP
        )
        gpu.launches.clear()
        gpu.waits.clear()
        launches = []
        for number in range(CALLS):
            loss = captured(base[sample], torch.tensor([number, 900], device=DEVICE))
            launches.append(gpu.launches[:])
            gpu.launches.clear()
        assert captured.is_captured
        assert (gpu.num_captures, gpu.num_replays) == (1, CALLS - WARMUP)
        # Two ordinary steps and the captured one; replays launch nothing from Python.
        assert launches[0] == launches[1] == launches[2] != []
        assert launches[3] == launches[4] == []
        kernels = {name for name, *_ in launches[0]}
        assert {"attention_map_sum_kernel", "feature_partials_kernel"} <= kernels
        assert {"denoising_indicator_kernel", "lora_gram_kernel"} <= kernels
        # Timesteps come from the host; beside that the steps outside wait for nothing either.
        assert gpu.waits == {"tensor from host memory to the GPU": CALLS}
        assert loss.device == DEVICE


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
def test_anchors_come_from_the_host_without_a_wait(moments: str) -> None:
    with ImaginedGPU() as gpu:
        param = torch.nn.Parameter(torch.ones(5000, device=DEVICE))
        param.grad = torch.ones_like(param)
        optimizer = AnchoredAdamW(
            [param], anchor_weight=0.1, anchor_storage="host", moments=moments, max_grad_norm=1.0
        )
        # The first makes tables and the buffers that anchors come through.
        optimizer.step()
        launches = gpu.launches[:]
        with gpu.step():
            optimizer.step()
        assert gpu.launches == 2 * launches != []
