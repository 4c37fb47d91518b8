"""What is common to tests of one loss from its equation: float64, a second network, all in full."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastppt.families.base import Family
from fastppt.trainables.lora import LoraAdapters
from fastppt.training.batch import draw
from fastppt.training.metric_names import loss_names
from fastppt.training.step import Step, accumulate_gradients
from tests.training.plain_step import PlainNetwork


class PlainPass:
    """One pass of a step: what tuned and base network predict, and what they should.

    Attributes:
        prediction: Of the tuned network on the subject prompt, whole weights W + B A.
        base: Of the base on the class prompt.
        target: Noise, or the velocity where the model predicts that.
        alphas: abar of each sample's timestep.
    """

    def __init__(
        self,
        step: Step,
        network: PlainNetwork,
        leaves: dict[str, tuple[Tensor, Tensor]],
    ) -> None:
        draws = draw(step)
        mean, std = step.latents.posteriors[draws.photos, 0].unbind(1)
        latents = mean + std * draws.posterior_normals
        self.timesteps = draws.timesteps
        noisy, self.target = network.noised(latents, draws.noise, draws.timesteps)
        if not network.joint:
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
            self.alphas = torch.cumprod(1 - betas, 0).double()[draws.timesteps]
        weights = dict(network.weights)
        for name, (down, up) in leaves.items():
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + up @ down
        prompts, sizes = step.prompts, step.prompts.sizes[draws.photos]
        subject = prompts.embeddings[prompts.subject_rows[draws.photos]]
        plain = prompts.embeddings[prompts.class_rows[draws.photos]]
        self.prediction = network(weights, noisy, draws.timesteps, subject, sizes)[0]
        with torch.no_grad():
            self.base = network(network.weights, noisy, draws.timesteps, plain, sizes)[0]

    def losses(self, prediction: Tensor) -> Tensor:
        """The squared error of each sample, averaged."""
        return ((prediction - self.target) ** 2).mean((1, 2, 3))


def compare_with_equation(
    step: Step,
    adapters: LoraAdapters,
    family: Family,
    model: str,
    equation: Callable[[PlainPass], dict[str, Tensor]],
) -> list[dict[str, Tensor]]:
    """Assert that losses and gradients of a step are those of an equation; return its terms.

    ``equation`` gives the noted terms of a pass, the whole under ``loss``. The passes of the step
    are those of its accumulation.
    """
    network = PlainNetwork(family, model)
    leaves = {
        pair.name: (pair.down.clone().requires_grad_(), pair.up.clone().requires_grad_())
        for pair in adapters.pairs
    }
    num_passes = step.stage.gradient_accumulation
    state = step.generator.get_state()
    expected = []
    for _ in range(num_passes):
        terms = equation(PlainPass(step, network, leaves))
        (terms["loss"] / num_passes).backward()
        expected.append({name: term.detach() for name, term in terms.items()})
    step.generator.set_state(state)
    for _ in range(num_passes):
        accumulate_gradients(step)
    noted = dict(zip(loss_names(step.stage.objectives), step.losses.tolist(), strict=True))
    for name in expected[0]:
        mean = sum(float(terms[name]) for terms in expected) / num_passes
        assert abs(noted[name] - mean) <= 1e-9 * abs(mean), name
    flat = adapters.arena.flat.detach()
    for pair in adapters.pairs:
        for values, wanted in zip((pair.down, pair.up), leaves[pair.name], strict=True):
            offset = values.storage_offset() - flat.storage_offset()
            ours = adapters.arena.grad[offset : offset + values.numel()].view(values.shape)
            assert wanted.grad is not None, pair.name
            size = wanted.grad.abs().max()
            assert size > 0, pair.name
            assert (ours - wanted.grad).abs().max() <= 1e-9 * size, pair.name
    return expected
