"""OUT/README.md: what the files are and how to load them where."""

from __future__ import annotations

import json
import shlex

from fastppt.config import RunConfig
from fastppt.data.prompts import class_prompt, subject_prompt, subject_words
from fastppt.families.base import Family
from fastppt.outputs.lora_files import DIFFUSERS_FILE, run_name
from fastppt.trainables.lora import LoraAdapters

LOAD_MODEL = {
    "mini-sdxl": 'from fastppt.mini import build_mini\n\npipe = build_mini("mini-sdxl")',
}
LOAD_ANY = (
    "import torch\n"
    "from diffusers import DiffusionPipeline\n\n"
    'pipe = DiffusionPipeline.from_pretrained({path}, torch_dtype=torch.bfloat16).to("cuda")'
)


def model_card(
    config: RunConfig, family: Family, adapters: LoraAdapters, num_photos: int, seconds: float
) -> str:
    """Return the Markdown text."""
    name, subject = run_name(config), subject_words(config.prompts)
    prompt = subject_prompt(config.prompts)
    path = str(config.model.path)
    load_model = LOAD_MODEL.get(path, LOAD_ANY.format(path=json.dumps(path)))
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
{load_model}
pipe.load_lora_weights(".", weight_name="{DIFFUSERS_FILE}")
image = pipe({json.dumps(prompt)}).images[0]
```

In other programs, put `{name}.safetensors` into

| program | folder |
|---|---|
| ComfyUI | `models/loras/`, then the node *Load LoRA* |
| A1111, Forge | `models/Lora/`, then `<lora:{name}:1>` in the prompt |

## How it was made

| | |
|---|---|
| recipe | {config.method} |
| steps | {steps} in {seconds:.0f} s |
| rank, alpha | {adapters.rank}, {adapters.alpha:g} |
| trained parameters | {adapters.num_parameters:,} |
| resolution | {config.photos.resolution} |
| seed | {config.seed} |

`config.toml` reproduces the run: `fastppt train config.toml --output ELSEWHERE`.
"""
