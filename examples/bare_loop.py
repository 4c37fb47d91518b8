"""Train a LoRA that is held to the base model, in a loop of torch and diffusers alone.

    pip install . "peft>=0.21"
    python examples/bare_loop.py --output lora

Two statements differ from the same loop with AdamW; "fastppt:" marks them. The model and the photos
are the small ones that fastppt brings along.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.utils import load_image
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from fastppt.backend import lora_pairs  # fastppt: finds the LoRA
from fastppt.mini import build_mini, draw_demo_photos
from fastppt_kernels import AnchoredAdamW

RESOLUTION = 64


def parse_options() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the LoRA")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--anchor-weight", type=float, default=1e-3, help="0 is AdamW")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@torch.no_grad()
def encode_photos(pipe: StableDiffusionXLPipeline) -> torch.Tensor:
    """Return the latents of the demo photos, [photos, C, h, w]."""
    with tempfile.TemporaryDirectory() as folder:
        photos = [load_image(str(path)) for path in draw_demo_photos(Path(folder))]
    pixels = pipe.image_processor.preprocess(photos, RESOLUTION, RESOLUTION)
    return pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor


@torch.no_grad()
def encode_prompt(pipe: StableDiffusionXLPipeline, prompt: str, num_rows: int) -> dict:
    """Return what the UNet is told beside latents and timesteps."""
    tokens, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    sizes = torch.tensor([[RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION]])
    return {
        "encoder_hidden_states": tokens.repeat(num_rows, 1, 1),
        "added_cond_kwargs": {
            "text_embeds": pooled.repeat(num_rows, 1),
            "time_ids": sizes.repeat(num_rows, 1),
        },
    }


def main() -> None:
    """Train, and save what a pipeline's `load_lora_weights` reads."""
    options = parse_options()
    torch.manual_seed(options.seed)
    pipe = build_mini("mini-sdxl")
    latents = encode_photos(pipe)
    conditions = encode_prompt(pipe, "a photo of sks robot", options.batch_size)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)

    unet = pipe.unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=targets))
    params = [param for param in unet.parameters() if param.requires_grad]

    # fastppt: was optimizer = torch.optim.AdamW(params, lr=options.learning_rate)
    optimizer = AnchoredAdamW(
        [{"params": params, "lora_pairs": lora_pairs(unet)}],
        lr=options.learning_rate,
        anchor_weight=options.anchor_weight,
        form="effective",
        max_grad_norm=1.0,
    )

    for step in range(1, options.steps + 1):
        clean = latents[torch.randint(len(latents), (options.batch_size,))]
        noise = torch.randn_like(clean)
        timesteps = torch.randint(1000, (options.batch_size,))
        noisy = scheduler.add_noise(clean, noise, timesteps)
        prediction = unet(noisy, timesteps, **conditions).sample
        target = scheduler.get_velocity(clean, noise, timesteps)
        loss = torch.nn.functional.mse_loss(prediction, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.4f}, anchor {optimizer.penalty.item():.2e}")

    StableDiffusionXLPipeline.save_lora_weights(
        options.output, unet_lora_layers=get_peft_model_state_dict(unet)
    )
    print(f"saved in {options.output}")


if __name__ == "__main__":
    main()
