"""Train a LoRA that is held to the base model, in a loop of accelerate.

    pip install . "peft>=0.21"
    accelerate launch examples/accelerate_loop.py --output lora

Gradient accumulation, mixed precision and several processes are accelerate's. "fastppt:" marks
what differs from the same loop with AdamW. The model and the photos are the small ones that fastppt
brings along.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.optimization import get_scheduler
from diffusers.utils import load_image
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch.utils.data import DataLoader, RandomSampler

from fastppt.backend import lora_pairs  # fastppt: finds the LoRA
from fastppt.mini import build_mini, draw_demo_photos
from fastppt_kernels import AnchoredAdamW

RESOLUTION = 64


def parse_options() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the LoRA")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=2, help="passes of a step")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--anchor-weight", type=float, default=1e-3, help="0 is AdamW")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@torch.no_grad()
def encode(pipe: StableDiffusionXLPipeline, num_rows: int) -> tuple[torch.Tensor, dict]:
    """Return the latents of the demo photos, and what the UNet is told beside noisy ones."""
    with tempfile.TemporaryDirectory() as folder:
        photos = [load_image(str(path)) for path in draw_demo_photos(Path(folder))]
    pixels = pipe.image_processor.preprocess(photos, RESOLUTION, RESOLUTION).to(pipe.device)
    latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    tokens, _, pooled, _ = pipe.encode_prompt(
        "a photo of sks robot", do_classifier_free_guidance=False
    )
    sizes = tokens.new_tensor([[RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION]])
    added = {"text_embeds": pooled.repeat(num_rows, 1), "time_ids": sizes.repeat(num_rows, 1)}
    told = {"encoder_hidden_states": tokens.repeat(num_rows, 1, 1), "added_cond_kwargs": added}
    return latents.cpu(), told


def main() -> None:
    """Train, and save what a pipeline's `load_lora_weights` reads."""
    options = parse_options()
    accelerator = Accelerator(
        gradient_accumulation_steps=options.accumulation, mixed_precision=options.precision
    )
    set_seed(options.seed, device_specific=True)
    pipe = build_mini("mini-sdxl").to(accelerator.device)
    latents, told = encode(pipe, options.batch_size)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)

    unet = pipe.unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=targets))
    # fastppt: was torch.optim.AdamW, and accelerator.clip_grad_norm_ in the loop. The anchor is
    # what the LoRA adds now: nothing on all processes, as ups are 0. Else say anchor="first_step".
    params = [param for param in unet.parameters() if param.requires_grad]
    optimizer = AnchoredAdamW(
        [{"params": params, "lora_pairs": lora_pairs(unet)}],
        lr=options.learning_rate,
        anchor_weight=options.anchor_weight,
        form="effective",
        max_grad_norm=1.0,
    )
    num_updates = options.steps * accelerator.num_processes
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=0, num_training_steps=num_updates
    )
    num_samples = options.steps * options.accumulation * options.batch_size
    sampler = RandomSampler(
        latents, replacement=True, num_samples=num_samples * accelerator.num_processes
    )
    loader = DataLoader(latents, options.batch_size, sampler=sampler)
    unet, optimizer, loader, schedule = accelerator.prepare(unet, optimizer, loader, schedule)

    for clean in loader:
        with accelerator.accumulate(unet):
            noise = torch.randn_like(clean)
            timesteps = torch.randint(1000, (len(clean),), device=clean.device)
            noisy = scheduler.add_noise(clean, noise, timesteps)
            prediction = unet(noisy, timesteps, **told).sample
            target = scheduler.get_velocity(clean, noise, timesteps)
            loss = torch.nn.functional.mse_loss(prediction.float(), target)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    accelerator.print(f"last step: loss {loss:.4f}, anchor {optimizer.optimizer.penalty:.2e}")

    if accelerator.is_main_process:
        values = get_peft_model_state_dict(accelerator.unwrap_model(unet))
        StableDiffusionXLPipeline.save_lora_weights(options.output, unet_lora_layers=values)
        print(f"saved in {options.output}")


if __name__ == "__main__":
    main()
