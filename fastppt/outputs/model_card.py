"""OUT/README.md: what the files are and how to load them where."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from fastppt.config import RunConfig
from fastppt.data.class_images import ClassImages
from fastppt.data.prompts import class_prompt, subject_prompt, subject_words
from fastppt.families.base import Family
from fastppt.families.lora_keys import has_kohya_form
from fastppt.outputs.card_code import card_code, needs_peft, quoted
from fastppt.outputs.embeddings import SUFFIX, embedding_name
from fastppt.outputs.lora_files import has_lora, lora_name, run_name
from fastppt.outputs.lora_metadata import objectives_in_words
from fastppt.outputs.network_files import network_files
from fastppt.trainables.tokens import LearnedTokens
from fastppt.trainables.trainables import Trainables

# What was made of the base model, and a tag for it, by what moved in the network.
KINDS = {
    "lora": ("A LoRA for", "lora"),
    "dora": ("A DoRA for", "dora"),
    "loha": ("A LoHa for", "loha"),
    "lokr": ("A LoKr for", "lokr"),
    "oft": ("An OFT adapter for", "oft"),
    "boft": ("A BOFT adapter for", "boft"),
    "full": ("A fine-tune of", "dreambooth"),
    "custom_diffusion": ("A Custom Diffusion of", "custom-diffusion"),
    "svdiff": ("A set of spectral shifts (SVDiff) for", "svdiff"),
    "text_encoder_lora": ("A LoRA for the text encoders of", "lora"),
    "tokens": ("A word for", "textual-inversion"),
}


def model_card(
    config: RunConfig,
    family: Family,
    trainables: Trainables,
    num_photos: int,
    seconds: float,
    class_images: Sequence[ClassImages] = (),
) -> str:
    """Return the Markdown text; ``class_images`` are those of prior preservation, each set once."""
    name, subject = run_name(config), subject_words(config.prompts)
    prompt = subject_prompt(config.prompts)
    path = str(config.model.path)
    what, tag = KINDS[config.network or next(iter(config.trainables))]
    needs = " (needs `pip install peft`)" if needs_peft(config) else ""
    return f"""\
---
base_model: {quoted(path)}
library_name: diffusers
tags: [text-to-image, {tag}, {family.name}, fastppt]
instance_prompt: {quoted(prompt)}
---

# {name}

{what} `{path}` that knows **`{subject}`**, learned by fastppt from {num_photos} photos.
{_word_note(config, trainables.tokens)}
## Trigger words

Write `{subject}` where the subject should be: `{prompt}`.
The plain class, as the base model knows it, is still `{class_prompt(config.prompts)}`.

## How to use it

With fastppt:

```
fastppt generate --run . --prompt {shlex.quote(prompt)} --count 4
```

With diffusers{needs}:

```python
{card_code(config, family, trainables.tokens, prompt)}
```

Where fastppt is installed, `fastppt.load(pipe, ".")` puts all of it into any pipeline of the base.

{_programs(config, prompt, family, trainables.tokens)}

## How it was made

| | |
|---|---|
| recipe | {config.method} |
| trained, at which learning rate | {_rates(config)} |
| objectives and their weights | {objectives_in_words(config)} |
| steps | {config.steps_in_words} in {seconds:.0f} s |
{_rows(trainables, class_images)}
| resolution | {config.photos.resolution} |
| seed | {config.seed} |

`config.toml` reproduces the run: `fastppt train config.toml --output ELSEWHERE`.
"""


def _rates(config: RunConfig) -> str:
    """Return what each stage trained, and at which learning rates: `lora 0.0001, tokens 0.0005`."""
    return "; then ".join(
        ", ".join(
            f"{name}{f' ({part})' * bool(part)} {rate:g}"
            for name, table in stage.trainables.given.items()
            for part, rate in table.rates.items()
        )
        for stage in config.stage
    )


def _rows(trainables: Trainables, class_images: Sequence[ClassImages]) -> str:
    """Return what was trained as rows of a table: adapters, the learned word, class images."""
    lora, text, tokens = trainables.lora, trainables.text_encoder_lora, trainables.tokens
    rows = {}
    if lora is not None:
        rows["rank, alpha"] = f"{lora.rank}, {lora.alpha:g}"
    if text is not None:
        rows["rank, alpha of the text encoders"] = f"{text.rank}, {text.alpha:g}"
    if tokens is not None:
        start = "" if tokens.init is None else f", from `{tokens.init}`"
        plural = "s" * (len(tokens.words) > 1)
        rows["learned word"] = f"`{tokens.word}`: {len(tokens.words)} vector{plural}{start}"
    rows["trained parameters"] = f"{trainables.num_parameters:,}"
    if class_images:
        rows["class images"] = "; then ".join(map(str, class_images))
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _word_note(config: RunConfig, tokens: LearnedTokens | None) -> str:
    """Return a line that names the other file that is needed; none without a learned word."""
    if tokens is None:
        return ""
    file = embedding_name(tokens.word)
    if list(config.trainables) == ["tokens"]:
        return f"It is `{file}`, the embedding of the learned word `{tokens.word}`.\n"
    return f"It goes with `{file}`, the embedding of the learned word `{tokens.word}`: load both.\n"


def _programs(config: RunConfig, prompt: str, family: Family, tokens: LearnedTokens | None) -> str:
    """Return the table of other programs: where files go, and what a prompt then says."""
    if config.network not in (None, "lora", "full"):
        files = " and ".join(f"`{name}`" for name in network_files(config))
        return f"Other programs are not known to read {files}."
    programs = ["ComfyUI", "A1111, Forge"]
    places: dict[str, list[str]] = {}
    suffix = ""
    if config.network == "full":
        folders = ["`models/checkpoints/`", "`models/Stable-diffusion/`"]
        places[f"`{run_name(config)}{SUFFIX}`"] = folders
    if has_lora(config):
        # The others read no LoRA but of the kohya form.
        if not has_kohya_form(family.name):
            programs = programs[:1]
        folders = ["`models/loras/`, then the node *Load LoRA*", "`models/Lora/`"]
        places[f"`{lora_name(config)}{SUFFIX}`"] = folders
        suffix = f" <lora:{lora_name(config)}:1>"
    prompts = [prompt, prompt]
    if tokens is not None:
        file = embedding_name(tokens.word)
        places[f"`{file}`"] = ["`models/embeddings/`", "`embeddings/`"]
        # They know a word by the name of its file.
        stem = file.removesuffix(SUFFIX)
        prompts = [prompt.replace(tokens.word, said) for said in (f"embedding:{stem}", stem)]
    prompts[1] += suffix
    rows = [
        [program, *(folders[index] for folders in places.values()), f"`{prompts[index]}`"]
        for index, program in enumerate(programs)
    ]
    table = [["program", *places, "prompt"], ["---"] * (len(places) + 2), *rows]
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    return f"In other programs, put the files into\n\n{lines}"
