"""How the UNet and the text encoders are trained on the latents of the world's scenes."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save
from torch import Tensor

from fastppt.mini.contexts import CONTEXTS
from fastppt.mini.pretrain.judge import as_tensor
from fastppt.mini.pretrain.scenes import Scenes
from fastppt.mini.pretrain.training import CPU, Deadline, Schedule, train
from fastppt.mini.tokenizer import WORDS
from fastppt.mini.world import COLORS, IMAGE_SIZE, NOUNS, PLACES, STYLES
from fastppt.objectives.denoising import min_snr_weights
from fastppt.outputs.files import write_file

SCHEDULE = Schedule(num_steps=5000, learning_rate=1.2e-3, decay=0.5, average=0.999)

BATCH = 32

SNR_GAMMA = 5.0
"""Of the min-SNR weights (arXiv 2303.09556)."""

NO_PROMPT = 0.12
"""Share of samples without text, for classifier-free guidance."""

SAID = {"style": 0.85, "color": 0.75, "context": 0.8}
"""How often a caption says each. Without captions that leave things out, a prompt that does is read
wrongly."""

STRANGE_WORD = 0.15
"""Share of captions with a word that means nothing: a rare token then does not upset the rest."""


def encode_scenes(
    vae: AutoencoderKL, pixels: np.ndarray, work: Path, device: torch.device = CPU
) -> Tensor:
    """Return the latents of scenes and of their mirror images, made once for each encoder.

    Args:
        vae: Whose posterior means they are; on the CPU.
        pixels: RGB [N, 64, 64, 3], 8 bits.
        work: Folder in which they are kept, under a name that says which encoder's they are.
        device: Where they are encoded.

    Returns:
        [2, N, C, 16, 16], float16.
    """
    encoder = {
        name: value
        for name, value in vae.state_dict().items()
        if name.startswith(("encoder.", "quant_conv."))
    }
    path = work / f"latents-{hashlib.sha256(save(encoder)).hexdigest()[:12]}.safetensors"
    if not path.is_file():
        vae.to(device)
        parts = []
        with torch.no_grad():
            for at in range(0, len(pixels), 50):
                part = as_tensor(pixels[at : at + 50]).to(device)
                both = [vae.encode(half).latent_dist.mean for half in (part, part.flip(3))]
                parts.append(torch.stack(both).half().cpu())
        vae.to(CPU)
        write_file(path, save({"latents": torch.cat(parts, dim=1)}))
    latents: Tensor = load_file(path)["latents"]
    return latents


@dataclass(frozen=True)
class Captions:
    """Says scenes as prompts, each time with other parts left out."""

    scenes: Scenes

    def draw(self, index: int, random: np.random.Generator) -> str:
        """Return a prompt of one scene."""
        says = {part: random.random() < share for part, share in SAID.items()}
        color = tuple(COLORS)[self.scenes.colors[index]]
        words = [NOUNS[self.scenes.nouns[index]]]
        if says["color"]:
            words.insert(0, color)
        if random.random() < STRANGE_WORD:
            words.insert(int(random.integers(len(words) + 1)), _strange_word(random))
        if random.random() < 0.9:
            words.insert(0, "an" if words[0][0] in "aeiou" else "a")
        made = STYLES[self.scenes.styles[index]]
        if not says["style"]:
            made = ("picture", "image")[int(random.integers(2))]
        start = f"a {made} of" if made != "image" else "an image of"
        place = [CONTEXTS[PLACES[self.scenes.contexts[index]]][0]] if says["context"] else []
        return " ".join([start, *words, *place])


def train_network(
    pipeline: StableDiffusionXLPipeline,
    latents: Tensor,
    scenes: Scenes,
    work: Path,
    deadline: Deadline,
    schedule: Schedule = SCHEDULE,
    device: torch.device = CPU,
) -> None:
    """Train the UNet and both text encoders to predict the velocity, or go on with it.

    L = mean over B,C,H,W of w_t (v(z_t, t, c) - (sqrt(abar_t) e - sqrt(1 - abar_t) z))^2

    Source: velocity from arXiv 2202.00512, weights w_t from min-SNR (arXiv 2303.09556).

    Args:
        pipeline: Its UNet and text encoders are written.
        latents: Of the scenes and their mirror images, [2, N, C, 16, 16].
        scenes: Their truth.
        work: Folder of the state.
        deadline: When to stop.
        schedule: How long and how fast.
        device: Where they are trained.
    """
    unet, captions = pipeline.unet, Captions(scenes)
    abar = pipeline.scheduler.alphas_cumprod.float()
    weights = min_snr_weights(abar / (1 - abar), "v_prediction", SNR_GAMMA)
    if device == CPU:
        # The backward of a fused attention is slower there at these sizes.
        unet.set_attn_processor(AttnProcessor())

    def loss_of(generator: torch.Generator) -> Tensor:
        index = torch.randint(latents.shape[1], (BATCH,), generator=generator)
        mirrored = torch.randint(2, (BATCH,), generator=generator)
        clean = latents[mirrored, index].float()
        timesteps = torch.randint(len(abar), (BATCH,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        signal = abar[timesteps].sqrt()[:, None, None, None]
        remains = (1 - abar[timesteps]).sqrt()[:, None, None, None]
        random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        prompts = [captions.draw(number, random) for number in index.tolist()]
        said = torch.rand(BATCH, generator=generator) > NO_PROMPT
        said = said.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            tokens, pooled = encode_prompts(pipeline, prompts)
            predicted = unet(
                (signal * clean + remains * noise).to(device),
                timesteps.to(device),
                # An empty prompt is all zeros, as SDXL's pipeline has it.
                tokens * said[:, None, None],
                added_cond_kwargs={
                    "text_embeds": pooled * said[:, None],
                    "time_ids": _draw_sizes(generator).to(device),
                },
            ).sample
        squares = (predicted.float() - (signal * noise - remains * clean).to(device)).square()
        weighted: Tensor = weights[timesteps].to(device) * squares.mean((1, 2, 3))
        return weighted.mean()

    networks = {"unet": unet, "text": pipeline.text_encoder, "text_2": pipeline.text_encoder_2}
    train("network", networks, loss_of, schedule, work, deadline, seed=4, device=device)
    unet.set_default_attn_processor()


def encode_prompts(
    pipeline: StableDiffusionXLPipeline, prompts: list[str]
) -> tuple[Tensor, Tensor]:
    """Return what SDXL's UNet reads of prompts: tokens [B, K, D] and pooled text [B, P].

    Both encoders' last layer but one, side by side; the second one's projection.
    """
    sides = []
    pooled = torch.empty(0)
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        output = encoder(ids.input_ids.to(encoder.device), output_hidden_states=True)
        sides.append(output.hidden_states[-2])
        pooled = output[0]
    return torch.cat(sides, dim=-1), pooled


def _draw_sizes(generator: torch.Generator) -> Tensor:
    """Draw the six size numbers: photos of any size, now and then cropped, and the size drawn.

    None of it changes the picture, so that a model tuned on photos of another size is not upset.
    """
    sizes = torch.full((BATCH, 6), float(IMAGE_SIZE))
    sizes[:, :2] = torch.randint(IMAGE_SIZE, 1025, (BATCH, 2), generator=generator).float()
    crops = torch.randint(33, (BATCH, 2), generator=generator)
    cropped = torch.rand(BATCH, 1, generator=generator) < 0.2
    sizes[:, 2:4] = (crops * cropped).float()
    return sizes


def _strange_word(random: np.random.Generator) -> str:
    """An adjective that the world does not show, or letters without a meaning."""
    if random.random() < 0.3:
        return ("old", "new", "shiny", "rare", "small", "big")[int(random.integers(6))]
    while True:
        letters = random.integers(ord("a"), ord("z") + 1, int(random.integers(2, 6)))
        word = "".join(map(chr, letters.tolist()))
        if word not in WORDS:
            return word
