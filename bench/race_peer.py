"""The peer's whole job: DreamBooth LoRA as diffusers' own scripts do it, from files to file.

Re-enacted from diffusers' and peft's public interfaces after ``train_dreambooth_lora.py``,
``train_dreambooth_lora_sdxl.py`` and ``train_dreambooth_lora_sd3.py``, with the settings that their
documentation gives: class images are sampled through the whole pipeline, four at a time, and kept
as JPEG; the pipeline is let go and the model loaded anew; photos are read once and class images in
each step; the step is that of `bench.peer`. Left out, in the peer's favour: accelerate, the data
loader's collation, trackers, validation pictures, the checkpoint of step 500, and the pipeline that
the scripts load again at the end; the memory of the text encoders, which that of SDXL keeps to the
end; of float16, the scaling of the loss; of cached latents, that the scripts encode a photo again
beside each class image, and go on reading the files in each step. `python -m bench.peers` runs the
scripts themselves.

Shape legend: P photos and class images together, H and W picture height and width.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from PIL import Image, ImageOps
from torch import Tensor, nn

from bench.peer import DiffusersStep, Subject, add_adapters
from bench.race_plan import SAMPLING_BATCH, T5_TOKENS, Job
from bench.race_watch import Watch
from fastppt.families.base import PromptEmbeddings

PIPELINES: dict[str, Any] = {
    "sd": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
    "sd3": StableDiffusion3Pipeline,
}
# The scripts' own targets.
TARGETS = {
    "sd": ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_v_proj"),
    "sdxl": ("to_k", "to_q", "to_v", "to_out.0"),
    "sd3": (
        *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"),
    ),
}
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def run_peer(job: Job, watch: Watch) -> None:
    """Do the whole job, and leave the LoRA file in the job's output folder."""
    torch.manual_seed(job.settings.seed)
    if job.entrant.prior:
        with watch.phase("class_images"):
            sample_class_images(job, watch)
    with watch.phase("load"):
        pipeline, network = load_model(job)
    with watch.phase("encode"):
        step = make_step(job, pipeline, network, watch)
    for number in range(job.trained_steps):
        with watch.phase("training" if number else "first_step"):
            step()
            if number in (0, job.trained_steps - 1):
                watch.finish()
        watch.mark_step()
    with watch.phase("save"):
        save_adapters(job, pipeline, network)


def sample_class_images(job: Job, watch: Watch) -> None:
    """Sample the class images that are missing through the pipeline, as the scripts do.

    In the precision that is their default for it: float16 on a GPU, float32 on the CPU.
    """
    settings, folder = job.settings, job.class_images
    folder.mkdir(parents=True, exist_ok=True)
    have = len(list(folder.iterdir()))
    if have >= job.sampled_images:
        return
    dtype = torch.float16 if job.device == "cuda" else torch.float32
    pipeline = _load(job, dtype).to(job.device)
    pipeline.set_progress_bar_config(disable=True)
    prompt = job.prompts[1]
    for first in range(have, job.sampled_images, SAMPLING_BATCH):
        numbers = range(first, min(first + SAMPLING_BATCH, job.sampled_images))
        images = pipeline(
            [prompt] * len(numbers),
            num_inference_steps=settings.sampler_steps,
            guidance_scale=settings.guidance_scale,
            height=settings.resolution,
            width=settings.resolution,
        ).images
        for number, image in zip(numbers, images, strict=True):
            image.save(folder / f"{number}.jpg")
        watch.mark_batch()
    del pipeline
    _let_go()


def load_model(job: Job) -> tuple[Any, nn.Module]:
    """Load the model as it is trained, with adapters; returns the pipeline, and its network."""
    dtype = getattr(torch, job.settings.precision)
    pipeline = _load(job, {"vae": torch.float32, "default": dtype}).to(job.device)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    network = pipeline.transformer if job.settings.family == "sd3" else pipeline.unet
    add_adapters(network, job.settings.rank, TARGETS[job.settings.family])
    if dtype == torch.float16:
        # In bfloat16 they leave the adapters as they are.
        cast_training_params(network, dtype=torch.float32)
    return pipeline, network


def make_step(job: Job, pipeline: Any, network: nn.Module, watch: Watch) -> _JobStep:
    """Encode the prompts, read the photos, and return what takes a step."""
    family = job.settings.family
    embeddings, token_ids = encode_prompts(job, pipeline)
    if family != "sd":
        # That of sd is asked in each step.
        names = [name for name in pipeline.components if name.startswith("text_encoder")]
        pipeline.register_modules(**dict.fromkeys(names))
        _let_go()
    pictures = Pictures(job)
    subject = Subject(
        family=family,
        pipeline=pipeline,
        device=torch.device(job.device),
        dtype=getattr(torch, job.settings.precision),
        pixels=pictures,
        sizes=pictures.sizes,
        embeddings=embeddings,
        token_ids=token_ids,
    )
    return _JobStep(job, subject, network, watch)


@torch.no_grad()
def encode_prompts(job: Job, pipeline: Any) -> tuple[PromptEmbeddings, Tensor]:
    """Return what the text encoders make of the two prompts, and the first one's tokens [2, K]."""
    prompts, options = list(job.prompts), {}
    if job.settings.family == "sd3":
        options = {"prompt_2": None, "prompt_3": None, "max_sequence_length": T5_TOKENS}
    found = pipeline.encode_prompt(
        prompts,
        device=torch.device(job.device),
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        **options,
    )
    tokenizer = pipeline.tokenizer
    ids = tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    pooled = None if job.settings.family == "sd" else found[2]
    return PromptEmbeddings(found[0], pooled), ids.to(job.device)


class Pictures:
    """Photos, then class images, by number: [P, 3, H, W] in [-1, 1] as `Subject` has them.

    Photos are read once. A class image is read from its file each time, as in the scripts' data
    set, whose loader has no workers by default.

    Args:
        job: Whose photos and class images; these if it trains with them.
    """

    def __init__(self, job: Job) -> None:
        self._side = job.settings.resolution
        photos = sorted(path for path in job.photos.iterdir() if path.suffix.lower() in PICTURES)
        read = [read_picture(path, self._side) for path in photos]
        self._photos = [pixels for pixels, _ in read]
        self._class_files = sorted(job.class_images.iterdir()) if job.entrant.prior else []
        side = self._side
        self.sizes = [
            *(place for _, place in read),
            *[(side, side, 0, 0)] * len(self._class_files),
        ]
        self.num_photos, self.num_class_images = len(self._photos), len(self._class_files)

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self), 3, self._side, self._side])

    def __len__(self) -> int:
        return self.num_photos + self.num_class_images

    def __getitem__(self, number: int) -> Tensor:
        if number < self.num_photos:
            return self._photos[number]
        return read_picture(self._class_files[number - self.num_photos], self._side)[0]


def read_picture(path: Path, side: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Return a picture's middle [3, H, W], and its height, width and the cut's top and left.

    Scaled so that the short side fits, bilinear; the script of SDXL defaults to Lanczos. The
    scripts cut at random where this takes the middle.
    """
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    height, width = image.height, image.width
    scale = side / min(height, width)
    image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    top, left = (image.height - side) // 2, (image.width - side) // 2
    image = image.crop((left, top, left + side, top + side))
    pixels_hwc = torch.from_numpy(np.array(image, dtype=np.float32) / 127.5 - 1.0)
    return pixels_hwc.permute(2, 0, 1).contiguous(), (height, width, top, left)


class _JobStep(DiffusersStep):
    """The peer's step on shuffled photos, and beside each of them the class image of that place."""

    def __init__(self, job: Job, subject: Subject, network: nn.Module, watch: Watch) -> None:
        # Made before the cache is, which reads all pictures.
        self._watch = watch
        self._pictures: Any = subject.pixels
        self._places = self._shuffle()
        entrant = job.entrant
        super().__init__(
            subject,
            network,
            job.settings.batch_size,
            cached=entrant.cached,
            prior=entrant.prior,
        )

    def _encode_all(self) -> list[tuple[Tensor, Tensor]]:
        num_photos = self._pictures.num_photos
        photos = [self._encode([number]) for number in range(num_photos)]
        with self._watch.class_encoding():
            return photos + [self._encode([number]) for number in self._photos()[num_photos:]]

    def _next_photos(self) -> list[int]:
        places = list(itertools.islice(self._places, self.batch_size))
        num_photos, num_class = self._pictures.num_photos, self._pictures.num_class_images
        photos = [place % num_photos for place in places]
        return photos + [num_photos + place % num_class for place in places if num_class]

    def _shuffle(self) -> Iterator[int]:
        longest = max(self._pictures.num_photos, self._pictures.num_class_images)
        while True:
            yield from torch.randperm(longest).tolist()


def save_adapters(job: Job, pipeline: Any, network: nn.Module) -> None:
    """Write the LoRA file as the scripts do, in float32."""
    layers = get_peft_model_state_dict(network.to(torch.float32))
    if job.settings.family == "sd3":
        pipeline.save_lora_weights(job.output, transformer_lora_layers=layers)
    else:
        unet_layers = convert_state_dict_to_diffusers(layers)
        pipeline.save_lora_weights(job.output, unet_lora_layers=unet_layers)


def _load(job: Job, dtype: Any) -> Any:
    family = job.settings.family
    options = {"safety_checker": None, "requires_safety_checker": False} if family == "sd" else {}
    pipeline: DiffusionPipeline = PIPELINES[family].from_pretrained(
        job.model, dtype=dtype, use_safetensors=True, **options
    )
    return pipeline


def _let_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
