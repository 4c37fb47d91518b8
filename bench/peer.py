"""The peer: one training step as diffusers' own DreamBooth LoRA scripts take it.

Re-enacted from diffusers' and peft's public interfaces after ``train_dreambooth_lora.py``,
``train_dreambooth_lora_sdxl.py`` and ``train_dreambooth_lora_sd3.py`` with their defaults, which
encode the photos anew in each step (the first also the prompt). Rank, targets and precision are
ours: in bfloat16 they cast all weights, the adapters' too, and run the network under autocast. What
accelerate, the data loader's collation of text and the progress bar cost on top is left out, in the
peer's favour.

Shape legend: B batch, P photos, N prompts, C latent channels, h and w latent height and width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from peft import LoraConfig
from torch import Tensor, nn

from fastppt.families.base import PromptEmbeddings
from fastppt.trainables.lora import LoraPair
from fastppt.training.batch import Draws

# The scripts' defaults, beside torch's own for AdamW. That of sd decays by 1e-2, which costs the
# same.
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 1e-4, 1.0
PRIOR_WEIGHT = 1.0


@dataclass(frozen=True)
class Subject:
    """What a peer is given: the same model, photos and prompts as ours.

    Attributes:
        family: "sd", "sdxl" or "sd3".
        pipeline: The pretrained model. Its network is not used: each trainer has one of its own.
        dtype: Of the network; the VAE, which is the peer's to cast, has its own.
        pixels: [P, 3, H, W] float32 on the host, in [-1, 1].
        sizes: What SDXL is told of each photo: original height and width, crop top and left.
        embeddings: Two rows: subject prompt and class prompt.
        token_ids: [2, K], the same prompts as the first text encoder's tokens.
    """

    family: str
    pipeline: DiffusionPipeline
    device: torch.device
    dtype: torch.dtype
    pixels: Tensor
    sizes: Sequence[tuple[int, int, int, int]]
    embeddings: PromptEmbeddings
    token_ids: Tensor


def add_adapters(network: nn.Module, rank: int, targets: Sequence[str]) -> None:
    """Freeze a network and give it peft's layers, as the scripts do.

    Args:
        network: Written.
        rank: Of the adapters, and their alpha.
        targets: Names of the projections, or ends of names.
    """
    network.requires_grad_(False).train()
    network.add_adapter(
        LoraConfig(
            r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets)
        )
    )


class DiffusersStep:
    """A training step of diffusers' scripts, on a network of its own.

    Args:
        subject: What is trained on.
        network: With adapters, as of `add_adapters`.
        batch_size: Photos in a step, class images not counted.
        cached: Take the latents' distributions from a cache, as the flag ``--cache_latents`` of
            some of the scripts does.
        prior: With prior preservation: as many class images again in each step. They are photos
            here: what they show costs nothing.
        precondition: SD3: weigh the loss by sigma^2, by preconditioned outputs (the default).
    """

    def __init__(
        self,
        subject: Subject,
        network: nn.Module,
        batch_size: int,
        *,
        cached: bool = False,
        prior: bool = False,
        precondition: bool = True,
    ) -> None:
        self.subject, self.network = subject, network
        if subject.family == "sd":
            # The others' scripts keep the VAE in float32.
            subject.pipeline.vae.to(subject.dtype)
        self.batch_size, self.prior, self.precondition = batch_size, prior, precondition
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [{"params": self.parameters, "lr": LEARNING_RATE}],
            betas=(0.9, 0.999),
            weight_decay=WEIGHT_DECAY,
            eps=1e-8,
        )
        self.schedule = get_scheduler("constant", optimizer=self.optimizer)
        scheduler = subject.pipeline.scheduler
        kind = FlowMatchEulerDiscreteScheduler if subject.family == "sd3" else DDPMScheduler
        self.noise = kind.from_config(scheduler.config)
        # Of the prompts: the subject's, and with prior preservation the class's.
        self.rows = [0, 1] if prior else [0]
        self.cache = self._encode_all() if cached else None
        self.place = 0

    def load(self, pairs: Sequence[LoraPair]) -> None:
        """Take the adapters' values from ours."""
        with torch.no_grad():
            for pair in pairs:
                layer = self.network.get_submodule(pair.name)
                layer.lora_A["default"].weight.copy_(pair.down)
                layer.lora_B["default"].weight.copy_(pair.up)

    def gradients(self, pairs: Sequence[LoraPair]) -> list[Tensor]:
        """Return the gradients of each pair's down and up, in this order."""
        layers = [self.network.get_submodule(pair.name) for pair in pairs]
        return [
            part["default"].weight.grad for layer in layers for part in (layer.lora_A, layer.lora_B)
        ]

    def __call__(self) -> float:
        """Take one step; returns the loss, read on the host as the progress bar does."""
        loss = self.loss(self._next_photos())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.detach().item()

    def loss(self, photos: Sequence[int], draws: Draws | None = None) -> Tensor:
        """Return the loss of photos (with prior preservation: subject's, then class's).

        Args:
            photos: Their numbers.
            draws: All the other chance; None draws as the scripts do.
        """
        latents = self._latents(photos, None if draws is None else draws.posterior_normals)
        latents = latents.to(self.subject.dtype)
        noise = torch.randn_like(latents) if draws is None else draws.noise.to(latents)
        if self.subject.family == "sd3":
            prediction, target, weight = self._flow(latents, noise, photos, draws)
        else:
            prediction, target = self._ddpm(latents, noise, photos, draws)
            weight = None
        if not self.prior:
            return _mean_squared_error(prediction, target, weight)
        halves = [None, None] if weight is None else weight.chunk(2)
        parts = zip(prediction.chunk(2), target.chunk(2), halves, strict=True)
        subject, prior = (_mean_squared_error(*part) for part in parts)
        return subject + PRIOR_WEIGHT * prior

    def _ddpm(
        self, latents: Tensor, noise: Tensor, photos: Sequence[int], draws: Draws | None
    ) -> tuple[Tensor, Tensor]:
        scheduler, num_steps = self.noise, self.noise.config.num_train_timesteps
        if draws is None:
            timesteps = torch.randint(0, num_steps, (len(photos),), device=latents.device).long()
        else:
            timesteps = draws.timesteps
        noisy = scheduler.add_noise(latents, noise, timesteps)
        conditions = {}
        prompts = self.subject.embeddings
        if self.subject.family == "sdxl":
            conditions = {
                "time_ids": torch.cat([self._time_ids(photo) for photo in photos]),
                "text_embeds": self._repeat(prompts.pooled),
            }
            text = self._repeat(prompts.tokens)
        else:
            # Encoded anew in each step (without --pre_compute_text_embeddings).
            with torch.no_grad():
                text = self.subject.pipeline.text_encoder(self._repeat(self.subject.token_ids))[0]
        with self._autocast():
            prediction = self.network(
                noisy, timesteps, text, added_cond_kwargs=conditions, return_dict=False
            )[0]
        if scheduler.config.prediction_type == "v_prediction":
            return prediction, scheduler.get_velocity(latents, noise, timesteps)
        return prediction, noise

    def _flow(
        self, latents: Tensor, noise: Tensor, photos: Sequence[int], draws: Draws | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        scheduler, num_steps = self.noise, self.noise.config.num_train_timesteps
        prompts = self.subject.embeddings
        if draws is None:
            drawn = compute_density_for_timestep_sampling(
                weighting_scheme="logit_normal",
                batch_size=len(photos),
                logit_mean=0.0,
                logit_std=1.0,
            )
            indices = (drawn * num_steps).long()
        else:
            # Ours count from picture to noise.
            indices = (num_steps - 1 - draws.timesteps).cpu()
        timesteps = scheduler.timesteps[indices].to(latents.device)
        sigmas = self._sigmas(timesteps, latents)
        noisy = (1.0 - sigmas) * latents + sigmas * noise
        with self._autocast():
            prediction = self.network(
                hidden_states=noisy,
                timestep=timesteps,
                encoder_hidden_states=self._repeat(prompts.tokens),
                pooled_projections=self._repeat(prompts.pooled),
                return_dict=False,
            )[0]
        weight = compute_loss_weighting_for_sd3(weighting_scheme="logit_normal", sigmas=sigmas)
        if self.precondition:
            return prediction * (-sigmas) + noisy, latents, weight
        return prediction, noise - latents, weight

    def _sigmas(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """Return [B, 1, 1, 1], looked up on the host one by one, as the script does."""
        table = self.noise.sigmas.to(like)
        known = self.noise.timesteps.to(like.device)
        rows = [(known == timestep).nonzero().item() for timestep in timesteps]
        return table[rows].flatten().view(-1, 1, 1, 1)

    def _latents(self, photos: Sequence[int], normals: Tensor | None) -> Tensor:
        """Return latents [B, C, h, w] of the photos, each drawn from the VAE's distribution."""
        if self.cache is None:
            mean, std = self._encode(photos)
        else:
            found = [self.cache[photo] for photo in photos]
            mean = torch.cat([mean for mean, _ in found])
            std = torch.cat([std for _, std in found])
        sample = mean + std * (torch.randn_like(mean) if normals is None else normals.to(mean))
        config = self.subject.pipeline.vae.config
        if config.shift_factor:
            sample = sample - config.shift_factor
        return sample * config.scaling_factor

    def _encode_all(self) -> list[tuple[Tensor, Tensor]]:
        return [self._encode([photo]) for photo in self._photos()]

    def _encode(self, photos: Sequence[int]) -> tuple[Tensor, Tensor]:
        vae = self.subject.pipeline.vae
        batch = torch.stack([self.subject.pixels[photo] for photo in photos])
        with torch.no_grad():
            # Like them it asks the VAE for its type in each step, and not for its device.
            found = vae.encode(batch.to(self.subject.device, vae.dtype)).latent_dist
        return found.mean, found.std

    def _repeat(self, prompts: Tensor) -> Tensor:
        """Return the prompts of a step, each as often as there are photos of it.

        One by one: a list of rows would be copied to the GPU, and awaited, as no script's is.
        """
        return torch.stack([prompts[row] for row in self.rows for _ in range(self.batch_size)])

    def _time_ids(self, photo: int) -> Tensor:
        size = tuple(self.subject.pixels.shape[-2:])
        ids = torch.tensor([[*self.subject.sizes[photo], *size]])
        return ids.to(self.subject.device, dtype=self.subject.dtype)

    def _photos(self) -> range:
        return range(len(self.subject.pixels))

    def _next_photos(self) -> list[int]:
        """Return the photos of a step, one after the other: what they are costs nothing."""
        count = self.batch_size * (2 if self.prior else 1)
        first, self.place = self.place, self.place + count
        return [place % len(self._photos()) for place in range(first, first + count)]

    def _autocast(self) -> torch.autocast:
        """Run the network as accelerate wraps it: in mixed precision if it is not in float32."""
        dtype = self.subject.dtype
        mixed = dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.subject.device.type, dtype=dtype, enabled=mixed)


def _mean_squared_error(prediction: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    # Like the scripts' .float(), but for float64.
    precise = torch.promote_types(prediction.dtype, torch.float32)
    prediction, target = prediction.to(precise), target.to(precise)
    if weight is None:
        return F.mse_loss(prediction, target, reduction="mean")
    return (weight.to(precise) * (prediction - target) ** 2).flatten(1).mean(1).mean()
