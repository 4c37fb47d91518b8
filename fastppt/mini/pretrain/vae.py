"""How the VAE is trained: encoder and decoder together first, then the decoder alone.

The encoder stands still after the first part, so that the latents of the scenes can be kept and the
network can be trained while the decoder is still getting sharper.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from fastppt.mini.judge import Judge
from fastppt.mini.pretrain.judge import as_tensor
from fastppt.mini.pretrain.training import CPU, Deadline, Schedule, train

SCHEDULE = Schedule(num_steps=5000, learning_rate=2e-3, average=0.995)
DECODER_SCHEDULE = Schedule(num_steps=5000, learning_rate=1e-3, average=0.998)

BATCH = 16

KL_WEIGHT = 1e-6
"""Small: it only keeps the latents from growing without bound."""

LATENT_NOISE = 0.05
"""Standard deviation of what is added to latents while the decoder learns, as what a network draws
is never exactly a latent."""

PERCEPTUAL_WEIGHT = 0.3
"""Of the difference in the judge's feature maps, beside that of the pixels."""


def train_vae(
    vae: AutoencoderKL,
    pixels: np.ndarray,
    work: Path,
    deadline: Deadline,
    device: torch.device = CPU,
) -> None:
    """Train encoder and decoder, and make the latents of mean 0 and standard deviation 1.

    The loss is the mean absolute difference of pixels and of their gradients, and `KL_WEIGHT` times
    the divergence from a normal distribution.

    Args:
        vae: Written.
        pixels: RGB [N, 64, 64, 3], 8 bits.
        work: Folder of the state.
        deadline: When to stop.
        device: Where it is trained.
    """

    def loss_of(generator: torch.Generator) -> Tensor:
        pictures = draw_pictures(pixels, generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pictures).latent_dist
            normals = torch.randn(posterior.mean.shape, generator=generator).to(device)
            decoded = vae.decode(posterior.mean + posterior.std * normals).sample
        divergence: Tensor = posterior.kl().float().mean()
        return pixel_loss(decoded.float(), pictures) + KL_WEIGHT * divergence

    train("vae", {"vae": vae}, loss_of, SCHEDULE, work, deadline, seed=2, device=device)
    fold_statistics_(vae, as_tensor(pixels[:2000]))


def train_decoder(
    vae: AutoencoderKL,
    judge: Judge,
    pixels: np.ndarray,
    work: Path,
    deadline: Deadline,
    device: torch.device = CPU,
) -> None:
    """Train the decoder alone, with the judge's feature maps in the loss.

    Args:
        vae: Of `train_vae`; its decoder is written.
        judge: Its maps at 32x32 and 16x16 are compared.
        pixels: RGB [N, 64, 64, 3], 8 bits.
        work: Folder of the state.
        deadline: When to stop.
        device: Where it is trained.
    """
    judge.requires_grad_(False).to(device)
    vae.to(device)
    vae.encoder.requires_grad_(False)
    assert vae.quant_conv is not None and vae.post_quant_conv is not None
    vae.quant_conv.requires_grad_(False)

    def loss_of(generator: torch.Generator) -> Tensor:
        pictures = draw_pictures(pixels, generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(pictures).latent_dist.mean
                wanted = judge.maps(pictures)[:2]
            noise = LATENT_NOISE * torch.randn(latents.shape, generator=generator)
            decoded = vae.decode(latents + noise.to(device)).sample
            drawn = judge.maps(decoded)[:2]
        difference = torch.stack(
            [
                (one.float() - two.float()).abs().mean() / two.float().abs().mean()
                for one, two in zip(drawn, wanted, strict=True)
            ]
        ).mean()
        return pixel_loss(decoded.float(), pictures) + PERCEPTUAL_WEIGHT * difference

    parts: dict[str, nn.Module] = {"decoder": vae.decoder, "post": vae.post_quant_conv}
    train("decoder", parts, loss_of, DECODER_SCHEDULE, work, deadline, seed=3, device=device)
    judge.to(CPU)
    vae.to(CPU)


def pixel_loss(decoded: Tensor, pictures: Tensor) -> Tensor:
    """Mean absolute difference, and half of that of neighbours' differences, which is edges."""
    difference = decoded - pictures
    across, down = difference.diff(dim=3), difference.diff(dim=2)
    return difference.abs().mean() + 0.5 * (across.abs().mean() + down.abs().mean())


def draw_pictures(pixels: np.ndarray, generator: torch.Generator) -> Tensor:
    """Draw a batch: mirrored half of the time, of exchanged colour channels a third of it.

    Exchanged channels make colours that no scene has: what a new subject is made of.
    """
    index = torch.randint(len(pixels), (BATCH,), generator=generator).numpy()
    pictures = as_tensor(pixels[index])
    mirrored = torch.rand(BATCH, generator=generator) < 0.5
    pictures = torch.where(mirrored[:, None, None, None], pictures.flip(3), pictures)
    order = torch.rand(BATCH, 3, generator=generator).argsort(1)
    kept = torch.rand(BATCH, generator=generator) > 1 / 3
    order[kept] = torch.arange(3)
    return pictures.gather(1, order[:, :, None, None].expand_as(pictures))


@torch.no_grad()
def fold_statistics_(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Make latents of mean 0 (each channel) and standard deviation 1 (all channels together).

    The shift and the scale go into the convolutions on both sides of the latents, so nothing has
    to be said in a configuration, and what is decoded stays what it was. Channels keep their
    relative size: what is fine detail stays small.
    """
    means = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(100)])
    mean = means.mean((0, 2, 3))
    scale = (means - mean[:, None, None]).std()
    channels = len(mean)
    assert vae.quant_conv is not None and vae.post_quant_conv is not None
    encode, decode = vae.quant_conv, vae.post_quant_conv
    assert encode.bias is not None and decode.bias is not None
    # The second half of the encoder's channels is the logarithm of the variance.
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= scale
    encode.weight[:channels] /= scale
    encode.bias[:channels] = (encode.bias[:channels] - mean) / scale
    encode.bias[channels:] -= 2 * scale.log()
