"""The adaptive denoising loss: the op, plain PyTorch with autograd, torch.compile."""

import pytest

from bench.suites import ADAPTIVE_DENOISING, LATENT_WORKLOADS


@pytest.mark.parametrize("way", ADAPTIVE_DENOISING.makers)
@pytest.mark.parametrize("workload", LATENT_WORKLOADS)
def test_adaptive_denoising(run_way, workload, way):
    run_way(ADAPTIVE_DENOISING, workload, way)


@pytest.mark.parametrize("workload", LATENT_WORKLOADS)
def test_adaptive_denoising_in_rotation(run_in_rotation, workload):
    run_in_rotation(ADAPTIVE_DENOISING, workload)
