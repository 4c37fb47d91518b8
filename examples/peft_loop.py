"""Train a LoRA of peft by Adaptive Personalized Training, in a loop of one's own.

    pip install . "peft>=0.21"
    python examples/peft_loop.py --output lora

Each step asks the base with the class prompt and the tuned network with the subject prompt.
Attention maps and features are held to the base's, and a sample weighs the less the more the
network overfits at its timestep. "fastppt:" marks what differs from a DreamBooth loop. The model
and the photos are the small ones that fastppt brings along.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.utils import load_image
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict

import fastppt
from fastppt.mini import build_mini, draw_demo_photos

RESOLUTION = 64


def parse_options() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the LoRA")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    # 30 is for a learned word that starts as the class noun's; this word is far from it.
    parser.add_argument("--feature-weight", type=float, default=0.1)
    parser.add_argument("--attention-weight", type=float, default=3e-4)
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
    # As many tokens in both, so that each attention map has its counterpart.
    subject = encode_prompt(pipe, "a photo of sks", options.batch_size)
    plain = encode_prompt(pipe, "a photo of robot", options.batch_size)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=targets)
    unet = get_peft_model(pipe.unet, config)
    params = [param for param in unet.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=options.learning_rate)

    # fastppt: looks into the layers that the method names, and watches the losses
    attached = fastppt.attach(
        unet, feature_weight=options.feature_weight, attention_weight=options.attention_weight
    )
    indicator = fastppt.OverfittingIndicator()

    for step in range(1, options.steps + 1):
        clean = latents[torch.randint(len(latents), (options.batch_size,))]
        noise = torch.randn_like(clean)
        timesteps = torch.randint(1000, (options.batch_size,))
        noisy = scheduler.add_noise(clean, noise, timesteps)
        # fastppt: the adapters are off in here
        with attached.base():
            base_prediction = unet(noisy, timesteps, **plain).sample
        prediction = unet(noisy, timesteps, **subject).sample
        target = scheduler.get_velocity(clean, noise, timesteps)
        # fastppt: was loss = torch.nn.functional.mse_loss(prediction, target)
        denoising = indicator.loss(prediction, base_prediction, target, timesteps)
        alignment = attached.losses()
        (denoising + alignment.total).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            gamma = indicator.gamma(timesteps).mean()
            print(f"step {step}: {denoising:.4f} + {alignment.total:.4f}, gamma {gamma:.2f}")

    # fastppt: the network is as it was before, but for its adapters
    attached.detach()
    StableDiffusionXLPipeline.save_lora_weights(
        options.output, unet_lora_layers=get_peft_model_state_dict(unet.base_model.model)
    )
    print(f"saved in {options.output}")


if __name__ == "__main__":
    main()
