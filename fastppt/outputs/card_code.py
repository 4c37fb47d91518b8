"""The Python code of a model card: what a stock pipeline needs to draw the subject."""

from __future__ import annotations

import json
from pathlib import Path

from fastppt.config import ModelConfig, RunConfig
from fastppt.families.base import Family
from fastppt.families.lora_keys import EMBEDDING_KEYS, LAYOUTS
from fastppt.families.names import LARGE_TEXT_ENCODERS, MINI_MODELS, PIPELINES
from fastppt.outputs.embeddings import SUFFIX, embedding_name
from fastppt.outputs.lora_files import DIFFUSERS_FILE, has_lora, run_name
from fastppt.outputs.network_files import CUSTOM_DIFFUSION_FILE, PIPELINE_FOLDER
from fastppt.trainables.tokens import LearnedTokens

ON_GPU = 'pipe.to("cuda", torch.bfloat16)'


def card_code(config: RunConfig, family: Family, tokens: LearnedTokens | None, prompt: str) -> str:
    """Return Python that loads the base model and the run's files, and draws a prompt.

    It runs in the run's folder. Where diffusers and peft have loaders, they are all that it uses.

    Args:
        config: The run's, resolved.
        family: Whose model was trained.
        tokens: The learned word, if there is one.
        prompt: To draw.
    """
    code, component = _load_code(config.model, family), family.lora_component
    draw = _draw_code(prompt, family, tokens)
    match config.network:
        case "full":
            code = _load_pipeline_code(config.model, family)
        case "custom_diffusion" if hasattr(family.network, "load_attn_procs"):
            # Without the pipeline, diffusers reads the file and changes nothing.
            code += (
                f'\npipe.{component}.load_attn_procs(\n    ".", '
                f'weight_name="{CUSTOM_DIFFUSION_FILE}", _pipeline=pipe\n)'
            )
        case "dora":
            code += f'\npipe.load_lora_weights(".", weight_name="{run_name(config)}{SUFFIX}")'
        case "loha" | "lokr" | "oft":
            code = _with_import(code, "from peft import PeftModel")
            code += f'\npipe.{component} = PeftModel.from_pretrained(pipe.{component}, ".")'
        case None | "lora":
            pass
        case _:
            load = 'fastppt.load(pipe, ".")'
            # First rounded, weights might not be those that were trained.
            on_gpu = f'pipe.to("cuda")\n{load}\npipe.to(torch.bfloat16)'
            code = code.replace(ON_GPU, on_gpu) if ON_GPU in code else f"{code}\n{load}"
            return f"import fastppt\n{code}\n{draw}"
    if has_lora(config):
        code += f'\npipe.load_lora_weights(".", weight_name="{DIFFUSERS_FILE}")'
    if tokens is not None and len(tokens.rows) > 1:
        code = _with_import(code, "from safetensors.torch import load_file")
    return f"{code}\n{_word_code(family, tokens)}{draw}"


def quoted(value: str | list[str]) -> str:
    """Return a value as Python, JSON and YAML write it: no escapes, which they read differently."""
    return json.dumps(value, ensure_ascii=False)


def needs_peft(config: RunConfig) -> bool:
    """Say whether `card_code` needs the library peft."""
    return has_lora(config) or config.network in ("dora", "loha", "lokr", "oft", "boft")


def _with_import(code: str, line: str) -> str:
    """Return Python lines, imports first, with one more import among these."""
    return code.replace("\n\n", f"\n{line}\n\n", 1)


def _load_pipeline_code(model: ModelConfig, family: Family) -> str:
    """Return the Python lines that load the whole pipeline that the run left."""
    (pipeline, *_) = PIPELINES[family.name]
    load = f'pipe = {pipeline}.from_pretrained("{PIPELINE_FOLDER}")'
    if str(model.path) in MINI_MODELS:
        return f"from diffusers import {pipeline}\n\n{load}"
    return f"import torch\nfrom diffusers import {pipeline}\n\n{load}\n{ON_GPU}"


def _word_code(family: Family, tokens: LearnedTokens | None) -> str:
    """Return the Python lines that teach diffusers' pipeline the learned word; none without one."""
    if tokens is None:
        return ""
    file, word = quoted(embedding_name(tokens.word)), quoted(tokens.word)
    if len(tokens.rows) == 1:
        return f"pipe.load_textual_inversion({file}, token={word})\n"
    code = f"word = load_file({file})\n"
    encoders = [
        (
            f"word[{quoted(EMBEDDING_KEYS[name])}]",
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
        f"{code}):\n    tokenizer.add_tokens({quoted(list(tokens.words))})\n"
        "    text_encoder.resize_token_embeddings(len(tokenizer))\n"
        "    text_encoder.get_input_embeddings().weight.data[-len(rows):] = rows\n"
    )


def _draw_code(prompt: str, family: Family, tokens: LearnedTokens | None) -> str:
    """Return the Python line that draws the prompt."""
    arguments = [quoted(prompt)]
    if tokens is not None and not LAYOUTS[family.name].pipeline_loads_words:
        # The largest text encoder reads the prompt as it is written.
        written_out = family.text.expand(prompt)
        if written_out != prompt:
            arguments = [quoted(written_out), f"prompt_3={quoted(prompt)}"]
    arguments += [f"{key}={value}" for key, value in family.prompt_options.items()]
    return f"image = pipe({', '.join(arguments)}).images[0]"


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
    arguments = [quoted(path)]
    arguments += [f"{key}={quoted(value)}" for key, value in options.items() if value]
    arguments += [without] * bool(without)
    classes, before = [pipeline], ""
    if model.vae is not None:
        classes.insert(0, "AutoencoderKL")
        subfolder = ', subfolder="vae"' if (Path(model.vae) / "vae").is_dir() else ""
        place = f"{quoted(model.vae)}{subfolder}"
        before = f"vae = AutoencoderKL.{_loader(model.vae)}({place})\n"
        arguments.append("vae=vae")
    return (
        f"import torch\nfrom diffusers import {', '.join(classes)}\n\n{before}"
        f"pipe = {pipeline}.{_loader(path)}(\n    {', '.join(arguments)}\n)\n"
        f"{ON_GPU}"
    )


def _loader(path: str) -> str:
    return "from_single_file" if Path(path).suffix == ".safetensors" else "from_pretrained"
