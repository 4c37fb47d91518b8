"""A pipeline's weights in the layout that single-file checkpoints are published in.

That layout comes from CompVis' latent-diffusion and Stability AI's generative-models (UNet, VAE,
text encoders) and from Stability AI's sd3-ref (joint transformer). Web interfaces read it, and so
does diffusers' ``from_single_file``, whose conversion (``single_file_utils.py``) is the other way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastppt.families.checkpoints import VELOCITY_MARK, ZERO_SNR_MARK

State = dict[str, Tensor]

# What a part of a key is called in the original layout; a name begins where a word does.
UNET_NAMES = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
UNET_RESNET_NAMES = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
VAE_NAMES = {
    "conv_norm_out.": "norm_out.",
    "down_blocks.": "down.",
    "resnets.": "block.",
    "conv_shortcut.": "nin_shortcut.",
    "downsamplers.0.": "downsample.",
    "upsamplers.0.": "upsample.",
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}
OPEN_CLIP_NAMES = {
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.final_layer_norm.": "ln_final.",
    "text_projection.weight": "text_projection",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}
JOINT_NAMES = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj.": "x_embedder.proj.",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
    "proj_out.": "final_layer.linear.",
    "transformer_blocks.": "joint_blocks.",
    "norm1.linear.": "x_block.adaLN_modulation.1.",
    "norm1_context.linear.": "context_block.adaLN_modulation.1.",
    "attn.to_out.0.": "x_block.attn.proj.",
    "attn.to_add_out.": "context_block.attn.proj.",
    # Of 3.5: norms of query and key, and in some blocks a second attention.
    "attn.norm_q.": "x_block.attn.ln_q.",
    "attn.norm_k.": "x_block.attn.ln_k.",
    "attn.norm_added_q.": "context_block.attn.ln_q.",
    "attn.norm_added_k.": "context_block.attn.ln_k.",
    "attn2.to_out.0.": "x_block.attn2.proj.",
    "attn2.norm_q.": "x_block.attn2.ln_q.",
    "attn2.norm_k.": "x_block.attn2.ln_k.",
    "ff.net.0.proj.": "x_block.mlp.fc1.",
    "ff.net.2.": "x_block.mlp.fc2.",
    "ff_context.net.0.proj.": "context_block.mlp.fc1.",
    "ff_context.net.2.": "context_block.mlp.fc2.",
}


def original_layout(pipeline: Any) -> State:
    """Return a pipeline's weights under the keys and in the shapes of the original layout.

    Args:
        pipeline: Of a class in `names.PIPELINES`, stock: not taken apart by a family. Its largest
            text encoder may be missing. Not written; on the meta device shapes come back alone.

    Returns:
        Tensors of which some share memory with the pipeline's, or with each other.
    """
    parts: dict[str, State] = {"first_stage_model.": _vae(pipeline.vae)}
    match type(pipeline).__name__:
        case "StableDiffusionPipeline":
            parts["model.diffusion_model."] = _unet(pipeline.unet)
            # The second generation's comes from OpenCLIP; its activation tells.
            if pipeline.text_encoder.config.hidden_act == "quick_gelu":
                parts["cond_stage_model.transformer."] = _clip(pipeline.text_encoder)
            else:
                parts["cond_stage_model.model."] = _open_clip(pipeline.text_encoder)
        case "StableDiffusionXLPipeline":
            parts["model.diffusion_model."] = _unet(pipeline.unet)
            parts["conditioner.embedders.0.transformer."] = _clip(pipeline.text_encoder)
            parts["conditioner.embedders.1.model."] = _open_clip(pipeline.text_encoder_2)
            parts[""] = _marks(pipeline.scheduler.config)
        case "StableDiffusion3Pipeline":
            parts["model.diffusion_model."] = _joint_transformer(pipeline.transformer)
            parts["text_encoders.clip_l.transformer."] = _clip(pipeline.text_encoder)
            parts["text_encoders.clip_g.transformer."] = _clip(pipeline.text_encoder_2)
            if pipeline.text_encoder_3 is not None:
                parts["text_encoders.t5xxl.transformer."] = pipeline.text_encoder_3.state_dict()
        case name:
            raise AssertionError(name)
    return {
        prefix + key: tensor for prefix, state in parts.items() for key, tensor in state.items()
    }


def _marks(scheduler: Mapping[str, Any]) -> State:
    """Return the empty tensors by which programs tell how the model was trained."""
    is_marked = {
        VELOCITY_MARK: scheduler.get("prediction_type") == "v_prediction",
        ZERO_SNR_MARK: bool(scheduler.get("rescale_betas_zero_snr")),
    }
    return {mark: torch.empty(0) for mark, wanted in is_marked.items() if wanted}


def _unet(unet: Any) -> State:
    """Number the layers of all blocks through, each with its attention and resampler."""
    # A block has as many layers on the way up, and one less and the resampler on the way down.
    num_layers = unet.config.layers_per_block + 1

    def place(match: re.Match[str]) -> str:
        way, block, kind, layer = match[1], int(match[2]), match[3], int(match[4])
        index = block * num_layers + layer
        match way, kind:
            case "down", "downsamplers":
                return f"input_blocks.{(block + 1) * num_layers}.0.op."
            case "up", "upsamplers":
                # Behind the resnet and the attention of the block's last layer.
                after = 2 if hasattr(unet.up_blocks[block], "attentions") else 1
                return f"output_blocks.{(block + 1) * num_layers - 1}.{after}.conv."
            case "down", _:
                # The first of the input blocks is the convolution.
                return f"input_blocks.{1 + index}.{int(kind == 'attentions')}."
        return f"output_blocks.{index}.{int(kind == 'attentions')}."

    state = {}
    for key, tensor in unet.state_dict().items():
        if ".resnets." in key:
            key = _rename(key, UNET_RESNET_NAMES)
        key = _rename(key, UNET_NAMES)
        state[re.sub(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(?:conv\.)?", place, key)] = tensor
    return state


def _vae(vae: Any) -> State:
    """Number the decoder's blocks from the image, and project by 1x1 convolutions."""
    last = len(vae.config.up_block_types) - 1
    state = {}
    for key, tensor in vae.state_dict().items():
        if ".attentions." in key and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        key = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", key)
        state[_rename(key, VAE_NAMES)] = tensor
    return state


def _clip(encoder: nn.Module) -> State:
    """Keep the keys, which are those of transformers before a lone text model lost its prefix."""
    prefix = "" if hasattr(encoder, "text_model") else "text_model."
    return {prefix + key: tensor for key, tensor in encoder.state_dict().items()}


def _open_clip(encoder: nn.Module) -> State:
    """Stack query, key and value; the projection, if there is one, multiplies from the right."""
    state = _stack_projections(_clip(encoder), "self_attn.{}_proj.", "attn.in_proj_")
    if "text_projection.weight" in state:
        state["text_projection.weight"] = state["text_projection.weight"].T
    return {_rename(key, OPEN_CLIP_NAMES): tensor for key, tensor in state.items()}


def _joint_transformer(transformer: Any) -> State:
    """Stack query, key and value; two modulations give the shift before the scale."""
    state = _stack_projections(transformer.state_dict(), "attn.to_{}.", "x_block.attn.qkv.")
    state = _stack_projections(state, "attn.add_{}_proj.", "context_block.attn.qkv.")
    state = _stack_projections(state, "attn2.to_{}.", "x_block.attn2.qkv.")
    last = len(transformer.transformer_blocks) - 1
    for key, tensor in state.items():
        if key.startswith(("norm_out.", f"transformer_blocks.{last}.norm1_context.")):
            scale, shift = tensor.chunk(2)
            state[key] = torch.cat([shift, scale])
    return {_rename(key, JOINT_NAMES): tensor for key, tensor in state.items()}


def _stack_projections(state: State, name: str, stacked: str) -> State:
    """Return the state with query, key and value under one key each.

    Args:
        state: Not written.
        name: What their keys hold, with ``{}`` for q, k or v.
        stacked: What stands there instead.
    """
    query, key, value = (name.format(letter) for letter in "qkv")
    result = {}
    for full, tensor in state.items():
        if query in full:
            tensors = (tensor, state[full.replace(query, key)], state[full.replace(query, value)])
            result[full.replace(query, stacked)] = torch.cat(tensors)
        elif key not in full and value not in full:
            result[full] = tensor
    return result


def _rename(key: str, names: dict[str, str]) -> str:
    pattern = "|".join(re.escape(name) for name in names)
    return re.sub(rf"\b(?:{pattern})", lambda match: names[match[0]], key)
