"""The whole loss of a step from its equations: float64, maps materialised, nothing of the product.

All weights W + s B A are formed whole, in a second copy of the network with plain processors.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from fastppt.families.base import Family
from fastppt.training.batch import Draws
from fastppt.training.step import Step
from tests.training.plain_text import PlainText

# For each mini model: whose features and whose attention maps are held by default.
UP = "up_blocks.{}.attentions.{}"
FEATURE_LAYERS = {
    "mini-sdxl": [UP.format(block, layer) for block in (1, 2) for layer in (0, 1)],
    "mini-sd": [UP.format(block, layer) for block in (2, 3) for layer in (0, 1)],
    "mini-sd3": ["transformer_blocks.1", "transformer_blocks.2"],
}
ATTENTION_LAYERS = {
    "mini-sdxl": [
        *(
            f"{UP.format(1, layer)}.transformer_blocks.{depth}.attn2"
            for layer in (0, 1)
            for depth in (0, 1)
        ),
        *(f"{UP.format(2, layer)}.transformer_blocks.0.attn2" for layer in (0, 1)),
    ],
    "mini-sd": [f"{name}.transformer_blocks.0.attn2" for name in FEATURE_LAYERS["mini-sd"]],
    "mini-sd3": ["transformer_blocks.1.attn", "transformer_blocks.2.attn"],
}
TEMPERATURES = {"mini-sdxl": 1000.0, "mini-sd": 100.0, "mini-sd3": 1000.0}

Leaves = dict[str, tuple[Tensor, Tensor]]


class PlainAttention:
    """Attention by the book, of both kinds; notes the map of image tokens over text tokens."""

    def __init__(self) -> None:
        self.map_sum: Tensor | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Any:
        joint = attn.added_kv_proj_dim is not None
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        source = hidden_states if joint else text
        query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        num_image = query.shape[1]
        if joint:
            query = torch.cat([query, attn.add_q_proj(text)], 1)
            key = torch.cat([key, attn.add_k_proj(text)], 1)
            value = torch.cat([value, attn.add_v_proj(text)], 1)
        query, key, value = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value)
        )
        maps = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        if encoder_hidden_states is not None:
            first_text = num_image if joint else 0
            self.map_sum = maps[:, :, :num_image, first_text:].sum(1)
            self.num_heads = attn.heads
        mixed = (maps @ value).transpose(1, 2).flatten(2)
        if not joint:
            return attn.to_out[0](mixed)
        image = attn.to_out[0](mixed[:, :num_image])
        return image, None if attn.context_pre_only else attn.to_add_out(mixed[:, num_image:])


class PlainNetwork:
    """A fresh network; gives its prediction, features and map sums for any weights."""

    def __init__(self, family: Family, model: str) -> None:
        self.model, self.network = model, family.network
        self.joint = model == "mini-sd3"
        self.velocity = family.prediction_type == "v_prediction"
        self.features: dict[str, Tensor] = {}
        self.attentions = {}
        for name, module in self.network.named_modules():
            if isinstance(module, Attention):
                module.processor = PlainAttention()
            if name in ATTENTION_LAYERS[model]:
                self.attentions[name] = module.processor
        for name in FEATURE_LAYERS[model]:
            self.network.get_submodule(name).register_forward_hook(self._note(name))
        self.weights = dict(self.network.named_parameters())

    def _note(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            # [B, channels, places]
            self.features[name] = output[1].mT if self.joint else output[0].flatten(2)

        return hook

    def __call__(
        self, weights: dict[str, Tensor], noisy: Tensor, timestep: Tensor, text: Any, sizes: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        extra: dict[str, Any] = {"return_dict": False}
        if self.joint:
            sigma = self.sigma(timestep)
            extra |= {"pooled_projections": text.pooled, "encoder_hidden_states": text.tokens}
            arguments: tuple[Tensor, ...] = (noisy,)
            extra["timestep"] = 1000 * sigma
        else:
            arguments = (noisy, timestep, text.tokens)
            if self.model == "mini-sdxl":
                extra["added_cond_kwargs"] = {"text_embeds": text.pooled, "time_ids": sizes}
        prediction = torch.func.functional_call(self.network, weights, arguments, extra)[0]
        maps = {name: attention.map_sum for name, attention in self.attentions.items()}
        return prediction, dict(self.features), maps

    @staticmethod
    def sigma(timestep: Tensor) -> Tensor:
        """SD3's sigma after the shift of 3, in float32 as its tables are."""
        plain = (timestep.float() + 1) / 1000
        return (3 * plain / (1 + 2 * plain)).double()

    def noised(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents and the target."""
        if self.joint:
            sigma = self.sigma(timestep).view(-1, 1, 1, 1)
            return sigma * noise + (1 - sigma) * latent, noise - latent
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
        alpha = torch.cumprod(1 - betas, 0).double()[timestep].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latent
        return noisy, velocity if self.velocity else noise


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, channels] of [B, channels, places]."""
    mean = features.mean(-1)
    variance = ((features - mean[..., None]) ** 2).mean(-1)
    return mean, (variance + 1e-6).sqrt()


def compare_maps(tuned: Tensor, base: Tensor, columns: list[list[int]], num_heads: int) -> Tensor:
    """Attention alignment of one layer, sample by sample and column by column."""
    total = torch.zeros((), dtype=torch.float64)
    for row, of_row in enumerate(columns):
        for column, other in enumerate(of_row):
            if other >= 0:
                difference = tuned[row, :, column] - base[row, :, other]
                total = total + (difference**2).sum() / num_heads
    return total / len(columns)


def plain_gamma(base: float, tuned: float, temperature: float) -> float:
    """The indicator of a bin."""
    value = 1 - torch.exp(torch.tensor(-temperature * (base - tuned), dtype=torch.float64)).item()
    return min(max(value, 0.0), 1.0)


def plain_terms(
    step: Step,
    network: PlainNetwork,
    draws: Draws,
    emas: list[list[float]],
    leaves: Leaves,
    *,
    scale: float = 1.0,
    prompts: PlainText | None = None,
    moved: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The terms of one pass; ``emas`` (base's, tuned's; NaN is not seen) are brought up to date.

    Without ``prompts`` the text is the step's own, as it was encoded for it. The tuned network has
    the ``moved`` weights in the place of its own.
    """
    weights = network.weights | (moved or {})
    for name, (down, up) in leaves.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + scale * (up @ down)
    temperature = TEMPERATURES[network.model]
    bins = [int(timestep) * 10 // 1000 for timestep in draws.timesteps]
    latents = []
    for row, photo in enumerate(draws.photos):
        base, tuned = (ema[bins[row]] for ema in emas)
        known = 0.0 if base != base else plain_gamma(base, tuned, temperature)
        view = 0
        if draws.augmentations[row] < min(known, 0.8):
            num_views = step.latents.posteriors.shape[1] - 1
            view = 1 + int(draws.view_fractions[row] * num_views)
        mean, std = step.latents.posteriors[photo, view]
        latents.append(mean + std * draws.posterior_normals[row])
    noisy, target = network.noised(torch.stack(latents), draws.noise, draws.timesteps)
    text: dict[str, Any]
    if prompts is None:
        rows = {"subject": step.prompts.subject_rows, "class": step.prompts.class_rows}
        text = {name: step.prompts.embeddings[which[draws.photos]] for name, which in rows.items()}
        columns = step.prompts.columns[draws.photos].tolist()
    else:
        photos = draws.photos
        text = {"subject": prompts.subject(photos), "class": prompts.plain_class(photos)}
        columns = prompts.columns(photos)
    sizes = step.prompts.sizes[draws.photos]
    with torch.no_grad():
        base_prediction, base_features, base_maps = network(
            network.weights, noisy, draws.timesteps, text["class"], sizes
        )
    prediction, features, maps = network(weights, noisy, draws.timesteps, text["subject"], sizes)
    losses = ((prediction - target) ** 2).mean((1, 2, 3))
    base_losses = ((base_prediction - target) ** 2).mean((1, 2, 3))
    for ema, seen in zip(emas, (base_losses.tolist(), losses.tolist()), strict=True):
        for index in set(bins):
            inside = [loss for loss, its in zip(seen, bins, strict=True) if its == index]
            mean_loss = sum(inside) / len(inside)
            old = ema[index]
            ema[index] = mean_loss if old != old else 0.9 * old + 0.1 * mean_loss
    gammas = [plain_gamma(emas[0][index], emas[1][index], temperature) for index in bins]
    gamma = torch.tensor(gammas, dtype=torch.float64)
    terms = {"denoising": ((1 - gamma) * losses).mean(), "gamma": gamma.mean()}
    terms["prediction_difference"] = ((prediction - base_prediction) ** 2).mean()
    zero = torch.zeros((), dtype=torch.float64)
    terms |= {"feature_mean": zero, "feature_std": zero, "attention_alignment": zero}
    for name in features:
        pairs = zip(statistics(features[name]), statistics(base_features[name]), strict=True)
        for term, (ours, theirs) in zip(("feature_mean", "feature_std"), pairs, strict=True):
            terms[term] = terms[term] + ((ours - theirs) ** 2).sum(1).mean()
    for name in maps:
        num_heads = network.attentions[name].num_heads
        loss = compare_maps(maps[name], base_maps[name], columns, num_heads)
        terms["attention_alignment"] = terms["attention_alignment"] + loss
    return terms
