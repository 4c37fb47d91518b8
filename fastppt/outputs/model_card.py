"""OUT/README.md: what the files are and how to load them where."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from fastppt.config import ModelConfig, RunConfig
from fastppt.data.prompts import class_prompt, subject_prompt, subject_words
from fastppt.families.base import Family
from fastppt.families.lora_keys import EMBEDDING_KEYS, LAYOUTS, has_kohya_form
from fastppt.families.names import LARGE_TEXT_ENCODERS, MINI_MODELS, PIPELINES
from fastppt.outputs.embeddings import SUFFIX, embedding_name
from fastppt.outputs.lora_files import DIFFUSERS_FILE, run_name
from fastppt.outputs.lora_metadata import objectives_in_words
from fastppt.trainables.tokens import LearnedTokens
from fastppt.trainables.trainables import Trainables


def model_card(
    config: RunConfig, family: Family, trainables: Trainables, num_photos: int, seconds: float
) -> str:
    """Return the Markdown text."""
    name, subject = run_name(config), subject_words(config.prompts)
    prompt = subject_prompt(config.prompts)
    path = str(config.model.path)
    steps = sum(stage.steps for stage in config.stage)
    return f"""\
---
base_model: {json.dumps(path)}
library_name: diffusers
tags: [text-to-image, lora, {family.name}, fastppt]
instance_prompt: {json.dumps(prompt)}
---

# {name}

A LoRA for `{path}` that knows **`{subject}`**, learned by fastppt from {num_photos} photos.
{_word_note(trainables.tokens)}
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
{_with_import(_load_code(config.model, family), trainables.tokens)}
pipe.load_lora_weights(".", weight_name="{DIFFUSERS_FILE}")
{_word_code(family, trainables.tokens)}{_draw_code(prompt, family, trainables.tokens)}
```

In other programs, put the files into

{_programs(name, prompt, family, trainables.tokens)}

## How it was made

| | |
|---|---|
| recipe | {config.method} |
| objectives and their weights | {objectives_in_words(config)} |
| steps | {steps} in {seconds:.0f} s |
{_trained_rows(trainables)}
| resolution | {config.photos.resolution} |
| seed | {config.seed} |

`config.toml` reproduces the run: `fastppt train config.toml --output ELSEWHERE`.
"""


def _trained_rows(trainables: Trainables) -> str:
    """Return what was trained as rows of a table: adapters, and the learned word."""
    lora, text, tokens = trainables.lora, trainables.text_encoder_lora, trainables.tokens
    assert lora is not None
    rows = {"rank, alpha": f"{lora.rank}, {lora.alpha:g}"}
    if text is not None:
        rows["rank, alpha of the text encoders"] = f"{text.rank}, {text.alpha:g}"
    if tokens is not None:
        start = "" if tokens.init is None else f", from `{tokens.init}`"
        plural = "s" * (len(tokens.words) > 1)
        rows["learned word"] = f"`{tokens.word}`: {len(tokens.words)} vector{plural}{start}"
    rows["trained parameters"] = f"{trainables.num_parameters:,}"
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _word_note(tokens: LearnedTokens | None) -> str:
    """Return a line that names the other file that is needed; none without a learned word."""
    if tokens is None:
        return ""
    file = embedding_name(tokens.word)
    return f"It goes with `{file}`, the embedding of the learned word `{tokens.word}`: load both.\n"


def _with_import(code: str, tokens: LearnedTokens | None) -> str:
    """Return Python lines, imports first, with the import that `_word_code` needs among these."""
    if tokens is None or len(tokens.rows) == 1:
        return code
    return code.replace("\n\n", "\nfrom safetensors.torch import load_file\n\n", 1)


def _word_code(family: Family, tokens: LearnedTokens | None) -> str:
    """Return the Python lines that teach diffusers' pipeline the learned word; none without one."""
    if tokens is None:
        return ""
    file, word = json.dumps(embedding_name(tokens.word)), json.dumps(tokens.word)
    if len(tokens.rows) == 1:
        return f"pipe.load_textual_inversion({file}, token={word})\n"
    code = f"word = load_file({file})\n"
    encoders = [
        (
            f"word[{json.dumps(EMBEDDING_KEYS[name])}]",
            name,
            name.replace("text_encoder", "tokenizer"),
        )
        for name in tokens.rows
    ]
    if LAYOUTS[family.name].pipeline_loads_words:
        for rows, encoder, tokenizer in encoders:
            code += f"pipe.load_textual_inversion(\n    {rows}, token={word},\n"
            code += f"    tokenizer=pipe.{tokenizer}, text_encoder=pipe.{encoder},\n)\n"
        return code
    # By hand, what load_textual_inversion does.
    code += "for tokenizer, text_encoder, rows in (\n"
    for rows, encoder, tokenizer in encoders:
        code += f"    (pipe.{tokenizer}, pipe.{encoder}, {rows}),\n"
    return (
        f"{code}):\n    tokenizer.add_tokens({json.dumps(list(tokens.words))})\n"
        "    text_encoder.resize_token_embeddings(len(tokenizer))\n"
        "    text_encoder.get_input_embeddings().weight.data[-len(rows):] = rows\n"
    )


def _draw_code(prompt: str, family: Family, tokens: LearnedTokens | None) -> str:
    """Return the Python line that draws the prompt."""
    arguments = [json.dumps(prompt)]
    if tokens is not None and not LAYOUTS[family.name].pipeline_loads_words:
        # The largest text encoder reads the prompt as it is written.
        written_out = family.text.expand(prompt)
        if written_out != prompt:
            arguments = [json.dumps(written_out), f"prompt_3={json.dumps(prompt)}"]
    arguments += [f"{key}={value}" for key, value in family.prompt_options.items()]
    return f"image = pipe({', '.join(arguments)}).images[0]"


def _programs(name: str, prompt: str, family: Family, tokens: LearnedTokens | None) -> str:
    """Return the table of other programs: where files go, and what a prompt then says."""
    loras = {"ComfyUI": "`models/loras/`, then the node *Load LoRA*"}
    # These read no LoRA but of the kohya form.
    if has_kohya_form(family.name):
        loras["A1111, Forge"] = "`models/Lora/`"
    words = {"ComfyUI": "`models/embeddings/`", "A1111, Forge": "`embeddings/`"}
    # They know a word by the name of its file.
    word = "" if tokens is None else tokens.word
    stem = "" if tokens is None else embedding_name(word).removesuffix(SUFFIX)
    prompts = {
        "ComfyUI": prompt.replace(word, f"embedding:{stem}") if word else prompt,
        "A1111, Forge": f"{prompt.replace(word, stem) if word else prompt} <lora:{name}:1>",
    }
    files = [f"`{name}{SUFFIX}`", *([f"`{stem}{SUFFIX}`"] if word else [])]
    rows = [
        [program, lora, *([words[program]] if word else []), f"`{prompts[program]}`"]
        for program, lora in loras.items()
    ]
    table = [["program", *files, "prompt"], ["---"] * (len(files) + 2), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


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
