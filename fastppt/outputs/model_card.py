"""OUT/README.md: what the files are and how to load them where."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from fastppt.config import ModelConfig, RunConfig
from fastppt.data.prompts import class_prompt, subject_prompt, subject_words
from fastppt.families.base import Family
from fastppt.families.lora_keys import has_kohya_form
from fastppt.families.names import LARGE_TEXT_ENCODERS, MINI_MODELS, PIPELINES
from fastppt.outputs.lora_files import DIFFUSERS_FILE, run_name
from fastppt.outputs.lora_metadata import objectives_in_words
from fastppt.trainables.lora import LoraAdapters

# Where other programs look for a LoRA, by whether it has the kohya form: A1111 and Forge read no
# other.
PROGRAMS = {
    True: (
        "| ComfyUI | `models/loras/`, then the node *Load LoRA* |\n"
        "| A1111, Forge | `models/Lora/`, then `<lora:{name}:1>` in the prompt |"
    ),
    False: "| ComfyUI | `models/loras/`, then the node *Load LoRA* |",
}


def model_card(
    config: RunConfig, family: Family, adapters: LoraAdapters, num_photos: int, seconds: float
) -> str:
    """Return the Markdown text."""
    name, subject = run_name(config), subject_words(config.prompts)
    prompt = subject_prompt(config.prompts)
    path = str(config.model.path)
    programs = PROGRAMS[has_kohya_form(family.name)].format(name=name)
    prompt_options = [f"{key}={value}" for key, value in family.prompt_options.items()]
    steps = sum(stage.steps for stage in config.stage)
    return f"""\
---
base_model: {json.dumps(path)}
library_name: diffusers
tags: [text-to-image, lora, {family.name}, fastppt]
instance_prompt: {json.dumps(prompt)}
---

# {name}

A LoRA for `{path}` that knows **{subject}**, learned by fastppt from {num_photos} photos.

## Trigger words

Write `{subject}` where the subject should be: `{prompt}`.
The plain class, as the base model knows it, is still `{class_prompt(config.prompts)}`.

## How to use it

With fastppt:

```
fastppt generate --lora . --prompt {shlex.quote(prompt)} --count 4
```

With diffusers (needs `pip install peft`):

```python
{_load_code(config.model, family)}
pipe.load_lora_weights(".", weight_name="{DIFFUSERS_FILE}")
image = pipe({", ".join([json.dumps(prompt), *prompt_options])}).images[0]
```

In other programs, put `{name}.safetensors` into

| program | folder |
|---|---|
{programs}

## How it was made

| | |
|---|---|
| recipe | {config.method} |
| objectives and their weights | {objectives_in_words(config)} |
| steps | {steps} in {seconds:.0f} s |
| rank, alpha | {adapters.rank}, {adapters.alpha:g} |
| trained parameters | {adapters.num_parameters:,} |
| resolution | {config.photos.resolution} |
| seed | {config.seed} |

`config.toml` reproduces the run: `fastppt train config.toml --output ELSEWHERE`.
"""


def _load_code(model: ModelConfig, family: Family) -> str:
    """Return the Python lines that load the base model as the run did."""
    path = str(model.path)
    dropped = [] if model.large_text_encoder else LARGE_TEXT_ENCODERS[family.name]
    without = ", ".join(f"{name}=None" for name in dropped)
    if path in MINI_MODELS:
        code = f'from fastppt.mini import build_mini\n\npipe = build_mini("{path}")'
        return code + f"\npipe.register_modules({without})" * bool(without)
    (pipeline, *_) = PIPELINES[family.name]
    options = {
        "revision": model.revision,
        "variant": model.variant,
        "config": None if model.config_folder is None else str(model.config_folder),
    }
    arguments = [json.dumps(path)]
    arguments += [f"{key}={json.dumps(value)}" for key, value in options.items() if value]
    arguments += [without] * bool(without)
    classes, before = [pipeline], ""
    if model.vae is not None:
        classes.insert(0, "AutoencoderKL")
        subfolder = ', subfolder="vae"' if (Path(model.vae) / "vae").is_dir() else ""
        place = f"{json.dumps(model.vae)}{subfolder}"
        before = f"vae = AutoencoderKL.{_loader(model.vae)}({place})\n"
        arguments.append("vae=vae")
    return (
        f"import torch\nfrom diffusers import {', '.join(classes)}\n\n{before}"
        f"pipe = {pipeline}.{_loader(path)}(\n    {', '.join(arguments)}\n)\n"
        'pipe.to("cuda", torch.bfloat16)'
    )


def _loader(path: str) -> str:
    return "from_single_file" if Path(path).suffix == ".safetensors" else "from_pretrained"
