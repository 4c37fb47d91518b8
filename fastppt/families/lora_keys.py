"""How LoRA and embedding files name the parts of each family, and what tells whose a file is.

A layer is known here by its component (`unet`, `transformer`, `text_encoder`, ...) and its module
path there, as diffusers and older transformers name it (`text_model.encoder.layers.0...`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fastppt.errors import UserError

LayerName = tuple[str, str]
"""Component and module path of an adapted layer."""


@dataclass(frozen=True)
class LoraLayout:
    """What LoRA files of a family are made of.

    Attributes:
        components: Parts of the pipeline that files may adapt, the network first.
        kohya_prefixes: What the keys of each begin with in the kohya form; empty where a file of
            that form would be of no use (diffusers loads one of sd3 and changes nothing).
        plain_text_encoders: Text encoders that are a `CLIPTextModel`, whose modules transformers 5
            names without the `text_model.` that files keep.
        pipeline_loads_words: Whether diffusers' pipeline has `load_textual_inversion`, and writes a
            word of several vectors out in prompts.
    """

    components: tuple[str, ...]
    kohya_prefixes: Mapping[str, str]
    plain_text_encoders: tuple[str, ...] = ()
    pipeline_loads_words: bool = True


LAYOUTS: dict[str, LoraLayout] = {
    "sd": LoraLayout(
        components=("unet", "text_encoder"),
        kohya_prefixes={"unet": "lora_unet", "text_encoder": "lora_te"},
        plain_text_encoders=("text_encoder",),
    ),
    "sdxl": LoraLayout(
        components=("unet", "text_encoder", "text_encoder_2"),
        kohya_prefixes={
            "unet": "lora_unet",
            "text_encoder": "lora_te1",
            "text_encoder_2": "lora_te2",
        },
        plain_text_encoders=("text_encoder",),
    ),
    "sd3": LoraLayout(
        components=("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"),
        kohya_prefixes={},
        pipeline_loads_words=False,
    ),
}
COMPONENTS = tuple(dict.fromkeys(name for one in LAYOUTS.values() for name in one.components))
KOHYA_COMPONENTS = {
    prefix: component
    for layout in LAYOUTS.values()
    for component, prefix in layout.kohya_prefixes.items()
}
KOHYA_KEY = re.compile(rf"({'|'.join(KOHYA_COMPONENTS)})_(.+)")

# Every module name on the way to a layer of a UNet or a CLIP text encoder that LoRA can adapt, and
# those of the original SDXL code that sd-scripts uses.
MODULE_NAMES = (
    *("down_blocks", "mid_block", "up_blocks", "input_blocks", "middle_block", "output_blocks"),
    *("attentions", "resnets", "downsamplers", "upsamplers", "transformer_blocks"),
    *("attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj"),
    *("proj_in", "proj_out", "conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut"),
    *("time_emb_proj", "time_embedding", "add_embedding", "linear_1", "linear_2"),
    *("text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    *("mlp", "fc1", "fc2", "text_projection"),
)
MODULE_NAME = re.compile(rf"({'|'.join(sorted(MODULE_NAMES, key=len, reverse=True))}|\d+)(?:_|$)")
# SDXL's UNet in the original code has two resnets a block; what comes third in a block of
# `input_blocks` is its downsampler, and `input_blocks.0` is `conv_in`.
SGM_LAYERS_A_BLOCK = 3
SGM_BLOCKS = ("input_blocks.", "middle_block.", "output_blocks.")
SGM_PATH = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.1\.(.+)")
SGM_MIDDLE = "middle_block.1."

# Text encoders, and their keys in an embedding file of two; a file of one tensor is of the first.
EMBEDDING_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
# The families that an embedding can be of, by the widths of its vectors.
EMBEDDING_FAMILIES = {
    (768,): "sd (1.x)",
    (1024,): "sd (2.x)",
    (768, 1280): "sdxl or sd3",
}

# What sd-scripts and ModelSpec call the base models of a family, by how the names begin.
MODEL_NAMES = {
    "sd_v": "sd",
    # ai-toolkit's numbers, 1.5 and 2.1.
    "sd_1": "sd",
    "sd_2": "sd",
    "stable-diffusion-v1": "sd",
    "stable-diffusion-v2": "sd",
    "sdxl": "sdxl",
    "stable-diffusion-xl": "sdxl",
    "sd3": "sd3",
    "3-medium": "sd3",
    "3-5-": "sd3",
    "stable-diffusion-3": "sd3",
    "stable-diffusion-v3": "sd3",
}
MODEL_NAME_KEYS = ("ss_base_model_version", "modelspec.architecture")
# Where files of fastppt name the family itself.
FAMILY_KEY = "fastppt.family"

# Layers of a UNet that one family has and the other has not; an SDXL of another size than the
# published one may have attention where only SD has it, but never SD where only SDXL has it.
ONLY_SD = re.compile(r"down_blocks\.0\.attentions\.|up_blocks\.[23]\.attentions\.")
ONLY_SDXL = re.compile(r"up_blocks\.0\.attentions\.|.*\.transformer_blocks\.[1-9]|add_embedding\.")

# Layers of a joint transformer, and of other transformers that share some of their names.
JOINT_ATTENTION = re.compile(r"transformer_blocks\.\d+\.attn\.")
OTHER_TRANSFORMERS = re.compile(r"single_|transformer_blocks\.\d+\.(attn1|img_m|txt_m)")


@dataclass(frozen=True)
class Detection:
    """Which family a LoRA file is of.

    Attributes:
        family: None if nothing tells.
        evidence: What told it.
    """

    family: str | None
    evidence: str


def parse_kohya_name(name: str) -> LayerName | None:
    """Return component and path of a layer in the kohya form; None if it is none.

    The form writes the path's dots as underscores, which module names have too. The names of
    modules being few, each is taken as long as it can be.

    Args:
        name: A key up to its first dot, such as ``lora_unet_mid_block_attentions_0_proj_in``.
    """
    match = KOHYA_KEY.fullmatch(name)
    if match is None:
        return None
    prefix, rest = match.groups()
    parts = []
    while rest:
        module = MODULE_NAME.match(rest)
        if module is None:
            return None
        parts.append(module[1])
        rest = rest[module.end() :]
    path = _from_sgm(".".join(parts))
    return None if path.startswith(SGM_BLOCKS) else (KOHYA_COMPONENTS[prefix], path)


def kohya_name(layer: LayerName, family: str | None) -> str:
    """Return the name of a layer in the kohya form.

    Raises:
        UserError: the family has no such form, or the layer no name in it.
    """
    component, path = layer
    prefixes = set()
    for name, layout in LAYOUTS.items():
        if family in (None, name) and component in layout.components:
            prefixes.add(layout.kohya_prefixes.get(component))
    if prefixes == {None} or (family is not None and not LAYOUTS[family].kohya_prefixes):
        raise UserError(
            f"{component}.{path}: LoRA of {family or 'this model'} has no kohya form (diffusers "
            "would load such a file and change nothing); use the form diffusers, which ComfyUI "
            "reads too"
        )
    if len(prefixes) != 1:
        raise UserError(
            f"{component}.{path}: nothing tells the model family of the file, and so its kohya key"
        )
    name = f"{prefixes.pop()}_{path.replace('.', '_')}"
    if parse_kohya_name(name) != layer:
        raise UserError(f"{component}.{path}: this layer has no name in the kohya form")
    return name


def canonical_path(component: str, path: str) -> str:
    """Return the path of a layer as files name it, from a path as a module's or a file's."""
    if component.startswith("text_encoder") and path.startswith("encoder.layers."):
        return f"text_model.{path}"
    return path


def module_path(layer: LayerName, family: str | None) -> str:
    """Return the path of a layer inside its loaded component, as transformers 5 names modules.

    Raises:
        UserError: nothing tells the family, and the families' text encoders differ.
    """
    component, path = layer
    if not component.startswith("text_encoder"):
        return path
    if family is None:
        raise UserError(
            f"{component}.{path}: nothing tells the model family of the file, and so what the "
            "text encoder calls this layer"
        )
    plain = component in LAYOUTS[family].plain_text_encoders
    return path.removeprefix("text_model.") if plain else path


def detect_family(
    layers: Collection[LayerName], metadata: Mapping[str, str], kohya_names: Collection[str] = ()
) -> Detection:
    """Tell the family of a LoRA file by its metadata, else by its layers; never by a guess.

    Args:
        layers: The adapted layers.
        metadata: The file's own.
        kohya_names: The layers' names in a file of the kohya form.
    """
    if metadata.get(FAMILY_KEY) in LAYOUTS:
        return Detection(metadata[FAMILY_KEY], f"{FAMILY_KEY} = {metadata[FAMILY_KEY]}")
    found = dict(_clues(layers, kohya_names))
    for key in MODEL_NAME_KEYS:
        if name := metadata.get(key):
            told = (family for start, family in MODEL_NAMES.items() if name.startswith(start))
            family = next(told, None)
            # A name that is not known may be that of a fine-tuned model, whose UNet still tells;
            # joint transformers of many families look alike.
            if family is not None or found.keys() <= {"sd3"}:
                return Detection(family, f"{key} = {name}")
    if len(found) == 1:
        return Detection(*found.popitem())
    if found:
        return Detection(None, "has layers of " + " and of ".join(sorted(found)))
    return Detection(None, "no layer and no metadata tells")


def has_kohya_form(family: str) -> bool:
    """Return whether LoRA of the family can be written in the kohya form."""
    return bool(LAYOUTS[family].kohya_prefixes)


def is_second_version(kohya_model_version: str) -> bool:
    """Return what sd-scripts notes as ``ss_v2``: whether the base model is a Stable Diffusion 2."""
    return kohya_model_version.startswith("sd_v2")


def _clues(layers: Collection[LayerName], kohya_names: Collection[str]) -> list[tuple[str, str]]:
    """Return each family that a layer speaks for, and that layer."""
    clues = []
    for name in kohya_names:
        if name.startswith("lora_te_"):
            clues.append(("sd", f"key {name}"))
        elif name.startswith(("lora_te1_", "lora_te2_")):
            clues.append(("sdxl", f"key {name}"))
    is_sdxl = any(component == "unet" and ONLY_SDXL.match(path) for component, path in layers)
    is_joint = not any(OTHER_TRANSFORMERS.match(path) for _, path in layers)
    for component, path in layers:
        layer = f"layer {component}.{path}"
        if component == "transformer" and is_joint and JOINT_ATTENTION.match(path):
            clues.append(("sd3", layer))
        elif component == "unet" and ONLY_SDXL.match(path):
            clues.append(("sdxl", layer))
        elif component == "unet" and ONLY_SD.match(path) and not is_sdxl:
            clues.append(("sd", layer))
    networks = {component for component, _ in layers}
    if "text_encoder_2" in networks and "transformer" not in networks and "unet" in networks:
        clues.append(("sdxl", "adapts text_encoder_2 beside a unet"))
    # The first clue of each family is the one shown.
    return clues[::-1]


def _from_sgm(path: str) -> str:
    """Return diffusers' path for a path of the original SDXL code; others come back unchanged."""
    if path.startswith(SGM_MIDDLE):
        return f"mid_block.attentions.0.{path.removeprefix(SGM_MIDDLE)}"
    match = SGM_PATH.fullmatch(path)
    if match is None:
        return path
    side, number, rest = match.groups()
    index = int(number) - (side == "input_blocks")
    block, layer = divmod(index, SGM_LAYERS_A_BLOCK)
    return f"{'down' if side == 'input_blocks' else 'up'}_blocks.{block}.attentions.{layer}.{rest}"
