"""Our own sampler: pictures of one prompt by the base model, each step a replay of one capture.

Shape legend: B pictures of a batch, C latent channels, h and w latent height and width, H and W
pixels, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fastppt.errors import UserError
from fastppt.families.base import Family, PromptEmbeddings
from fastppt.families.sampling import SamplerTable
from fastppt.trainables.trainables import Trainables
from fastppt.training.constants import Constants
from fastppt.training.graph import CapturedFunction, Recorder

DECODED_PIXELS = 2**20
"""Pixels that the VAE decodes at a time, those of one picture of 1024x1024: it runs in float32, and
what it works in grows with their number."""


class Sampler:
    """Draws batches of pictures, all of one prompt and size, by the base model.

    x <- keep_i x + push_i F(scale_i x, time_i),  F = F_negative + guidance (F_prompt - F_negative)

    Source: Ho and Salimans (arXiv 2207.12598) for the guidance, with the scale of diffusers, where
    1 is none; `SamplerTable` for the step. Latents are in float32 (float64 for a network in
    float64) whatever the network's dtype: our choice, diffusers rounds them to the network's.

    Args:
        family: The loaded model.
        trainables: What it trains; the base is asked.
        prompt: One row.
        negative: One row, what guidance pushes away from.
        size: (height, width) of the pictures, pixels; the network is told that they are uncropped.
        table: The steps.
        guidance_scale: Up to 1 there is no guidance, and half the rows.
        batch_size: B.
        recorder: Who captures the step; None runs it op by op.
    """

    def __init__(
        self,
        family: Family,
        trainables: Trainables,
        prompt: PromptEmbeddings,
        negative: PromptEmbeddings,
        *,
        size: tuple[int, int],
        table: SamplerTable,
        guidance_scale: float,
        batch_size: int,
        recorder: Recorder | None,
    ) -> None:
        self.guidance_scale = guidance_scale
        self.num_steps = len(table.times)
        self._family, self._trainables = family, trainables
        self._size, self._first_std = size, table.first_std
        is_guided = guidance_scale > 1
        rows = [negative] * batch_size * is_guided + [prompt] * batch_size
        self.tokens = torch.cat([row.tokens for row in rows])
        pooled = [row.pooled for row in rows if row.pooled is not None]
        self.pooled = torch.cat(pooled) if pooled else None
        self.sizes = family.size_conditions(size, (0, 0), size).expand(len(rows), -1)
        dtype = torch.promote_types(family.dtype, torch.float32)
        shape = batch_size, *family.latent_shape(size)
        self.latents = torch.zeros(shape, device=family.device, dtype=dtype)
        self.place = torch.zeros(1, device=family.device, dtype=torch.int64)
        columns = table.times, table.scales, table.keeps, table.pushes
        # [S, 4]
        self.steps = torch.stack(columns, dim=1).to(family.device, dtype)
        self._captured: CapturedFunction | None = None
        if recorder is not None:
            self._captured = CapturedFunction(
                self.take_step,
                recorder,
                written=lambda: [self.latents, self.place],
                constants=self._constants,
            )

    @property
    def batch_size(self) -> int:
        """Pictures that are drawn at a time."""
        return len(self.latents)

    def draw(self, seeds: Sequence[int]) -> Tensor:
        """Draw one batch.

        Args:
            seeds: One for each picture. Its noise is that of the stock pipeline for a generator of
                this seed on the CPU, whatever else is in the batch.

        Returns:
            [B, H, W, 3] uint8 on the host.

        Raises:
            UserError: what was drawn is not finite: the network's dtype is too narrow for it.
        """
        noise = [_noise(self.latents.shape[1:], seed) for seed in seeds]
        self.latents.copy_(torch.stack(noise) * self._first_std)
        self.place.zero_()
        take_step = self._captured or self.take_step
        for _ in range(self.num_steps):
            take_step()
        if not self.latents.isfinite().all():
            dtype = str(self._family.dtype).removeprefix("torch.")
            raise UserError(
                f"class images: the model's predictions in {dtype} are not finite, and so are no "
                "pictures; set model.precision to another one, such as fp32"
            )
        return self._decode()

    def close(self) -> None:
        """Let go of the captured step, and so of the memory that it works in."""
        self._captured = None

    @torch.no_grad()
    def take_step(self) -> None:
        """Take the step at `place` in the table, and move on. Nothing is read on the host."""
        time, scale, keep, push = self.steps.index_select(0, self.place)[0].unbind()
        num_rows = len(self.tokens)
        shown = self.latents * scale
        if num_rows > self.batch_size:
            shown = torch.cat([shown, shown])
        with self._trainables.base():
            prediction = self._family.predict_at(
                shown,
                time.float().expand(num_rows),
                PromptEmbeddings(self.tokens, self.pooled),
                self.sizes,
            ).to(self.latents.dtype)
        if num_rows > self.batch_size:
            negative, prompted = prediction.chunk(2)
            prediction = negative + self.guidance_scale * (prompted - negative)
        self.latents.copy_(keep * self.latents + push * prediction)
        # After the last comes the first: the try-outs of a capture may be more than the steps.
        self.place.add_(1).remainder_(self.num_steps)

    @torch.no_grad()
    def _decode(self) -> Tensor:
        """Return the latents' pictures [B, H, W, 3] as bytes, rounded."""
        height, width = self._size
        parts = []
        for latents in self.latents.split(max(1, DECODED_PIXELS // (height * width))):
            pixels = self._family.decode_latents(latents)
            parts.append(((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu())
        return torch.cat(parts).permute(0, 2, 3, 1).contiguous()

    def _constants(self) -> Constants:
        names = ("latents", "place", "steps", "tokens", "pooled", "sizes", "guidance_scale")
        network = self._family.network
        readers = {name: partial(getattr, self, name) for name in names}
        return Constants(readers, {type(network).__name__: network})


def _noise(shape: torch.Size, seed: int) -> Tensor:
    """Return standard normal draws in float32, as the stock pipelines make them."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
