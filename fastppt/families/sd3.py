"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206): flow matching, joint attention.

Shape legend: B batch, N prompts, K text tokens, D text width, W pooled width, C latent channels,
h and w latent height and width, T diffusion timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor, nn

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.attention import Projections
from fastppt.families.base import PromptEmbeddings, PromptIds
from fastppt.families.joint_attention import make_joint_adaptable
from fastppt.families.networks import (
    JOINT_CHANNEL_DIM,
    joint_feature_layers,
    joint_features_of,
    late_joint_blocks,
    with_joint_features,
)
from fastppt.families.pipeline import PipelineFamily
from fastppt.families.sampling import SamplerTable, flow_table


class StableDiffusion3(PipelineFamily):
    """SD3: two CLIPs and a T5, pooled text in the time embedding, rectified flow.

    A prompt's tokens are those that the CLIPs read, then ``model.max_tokens`` of the T5. Where the
    T5 is dropped (``model.large_text_encoder = false``, or none in the model) the CLIPs' tokens are
    all: diffusers' pipeline puts rows of zeros in the T5's place, as many as its
    ``max_sequence_length``; they cost attention and tell the network nothing of the prompt, so
    leaving them out is our choice, in training and in pictures.

    Args:
        pipeline: As of `PipelineFamily`, and so the others. The T5 is taken out of it if dropped.
        model: Where it came from.
        device: Where the network trains.
        dtype: Of the network and the text encoders.

    Raises:
        UserError: a scheduler of another kind, or ``model.max_tokens`` without a T5.
    """

    name = "sd3"
    repeated_blocks: tuple[str, ...] = ("JointTransformerBlock",)
    lora_component = "transformer"
    prediction_type = "flow"
    feature_channel_dim = JOINT_CHANNEL_DIM
    # What comes nearest to Custom Diffusion's cross-attentions in joint attention (our choice): the
    # text's keys and values, which the image looks at, with their biases.
    text_weights: tuple[str, ...] = ("*.attn.add_k_proj.*", "*.attn.add_v_proj.*")
    # What Adaptive Personalized Training (arXiv 2507.02687) has for a UNet; our choice here.
    indicator_temperature = 1000.0
    sampler, sampler_steps, sampler_guidance = "euler", 28, 7.0

    def __init__(
        self, pipeline: Any, model: ModelConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        scheduler = _training_scheduler(pipeline, model)
        if not model.large_text_encoder:
            pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
        self._num_t5_tokens = _num_t5_tokens(pipeline, model)
        self.prompt_options = {"max_sequence_length": self._num_t5_tokens}
        self.network: nn.Module = pipeline.transformer
        super().__init__(pipeline, model, device, dtype)
        self.num_timesteps: int = scheduler.config.num_train_timesteps
        config = pipeline.transformer.config
        # The text's query in the last block: its attention's text output goes nowhere.
        self.unread_projections: tuple[str, ...] = (
            f"transformer_blocks.{config.num_layers - 1}.attn.add_q_proj",
        )
        self.aligned_blocks: tuple[str, ...] = late_joint_blocks(config.num_layers)
        self.second_half: tuple[str, ...] = tuple(f"{block}.*" for block in self.aligned_blocks)
        self.native_resolution: int = config.sample_size * pipeline.vae_scale_factor
        self.resolution_step: int = pipeline.vae_scale_factor * config.patch_size
        self.largest_side: int | None = self.resolution_step * config.pos_embed_max_size
        # The scheduler counts from noise to picture. Its float32 tables are those the model was
        # trained with, whatever the dtype.
        self._sigma_t = scheduler.sigmas.flip(0).to(device, self._precise)
        self._time_t = scheduler.timesteps.flip(0).to(device)
        version, size = _version_and_size(config)
        # sd-scripts' names (library/sd3_utils.py); ModelSpec takes the original model's.
        self.kohya_model_version = f"{version.replace('.', '-')}-{size}"
        self.modelspec_architecture = f"stable-diffusion-{version}-{size}"

    def make_adaptable(self) -> list[Projections]:
        """Give every attention a processor with places for adapters, as `Family` says.

        The text's query in the last block is left out: nothing reads what it finds, so an adapter
        of it would have a gradient of zero.
        """
        return [
            group
            for processor in make_joint_adaptable(self.network, self._attend)
            for group in processor.groups
        ]

    def feature_layers(self) -> dict[str, nn.Module]:
        """Return the joint blocks, by path."""
        return joint_feature_layers(self.network)

    def features_of(self, output: Any) -> Tensor:
        """Return the image tokens [B, Q, C] of a block's output, which are second in it."""
        return joint_features_of(output)

    def with_features(self, output: Any, features: Tensor) -> Any:
        """Return a block's output with other image tokens."""
        return with_joint_features(output, features)

    def _encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeddings:
        """Return tokens [N, K, D] and pooled [N, W], as the pipeline encodes prompts.

        A new word of several vectors is written out for the CLIPs, which this pipeline does not do
        itself; the T5 reads the prompt as it stands.
        """
        texts = [self.text.expand(prompt) for prompt in prompts]
        tokens, _, pooled, _ = self._pipeline.encode_prompt(
            texts,
            texts,
            list(prompts),
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._num_t5_tokens,
        )
        return PromptEmbeddings(tokens.to(self.dtype), pooled.to(self.dtype))

    def encode_negative(self) -> PromptEmbeddings:
        """Return the embedding of the empty prompt, as the pipeline takes it for guidance."""
        return self.encode_prompts([""])

    @torch.no_grad()
    def prompt_ids(self, prompts: Sequence[str]) -> PromptIds:
        """Return the prompts as the CLIPs' tokens, and encoded by the T5 [N, K', D]."""
        if self._num_t5_tokens == 0:
            return super().prompt_ids(prompts)
        others = self.encode_prompts(prompts).tokens[:, self.text.num_tokens :]
        return PromptIds(self.text.ids(prompts), others.clone())

    def encode_ids(self, ids: PromptIds) -> PromptEmbeddings:
        """Return the CLIPs' penultimate layers side by side, then the T5's tokens, [N, K, D].

        What is pooled [N, W] is both CLIPs'. The T5's part has no gradient.
        """
        outputs = [
            clip(ids.clips[component], output_hidden_states=True)
            for component, clip in self.text.clips.items()
        ]
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        width = self._pipeline.transformer.config.joint_attention_dim
        tokens = F.pad(tokens, (0, width - tokens.shape[-1]))
        if ids.others is not None:
            tokens = torch.cat([tokens, ids.others], dim=1)
        return PromptEmbeddings(tokens, torch.cat([out.text_embeds for out in outputs], dim=-1))

    def size_conditions(
        self, original_size: tuple[int, int], crop: tuple[int, int], target_size: tuple[int, int]
    ) -> Tensor:
        """Return [0]: the network is told nothing of sizes."""
        return torch.empty(0, device=self.device, dtype=self._precise)

    def draw_timesteps(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Return [B] int64: floor(u T) with u logit-normal(0, 1).

        Source: arXiv 2403.03206, section 3.1; as diffusers' `train_dreambooth_lora_sd3.py` draws,
        which counts from noise to picture (the distribution is symmetric). The shift to more noise
        is in the table that the timesteps index.
        """
        normals = torch.randn(batch_size, generator=generator, device=self.device)
        # A float32 sigmoid can round up to 1.
        return (normals.sigmoid() * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def signal_to_noise(self) -> None:
        """Return None: what is between picture and noise is a straight line, not DDPM's path."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return z_t = s e + (1 - s) z (arXiv 2403.03206, eq. 13), s the shifted sigma."""
        sigma = self._sigma_t[timesteps].view(-1, 1, 1, 1)
        noisy: Tensor = sigma * noise + (1 - sigma) * latents
        return noisy

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the velocity e - z, the same at every timestep."""
        return noise - latents

    def predict(
        self, noisy: Tensor, timesteps: Tensor, prompts: PromptEmbeddings, sizes: Tensor
    ) -> Tensor:
        """Run the transformer on [B, C, h, w] latents; it is told s T. ``sizes`` is empty."""
        return self.predict_at(noisy, self._time_t[timesteps], prompts, sizes)

    def predict_at(
        self, noisy: Tensor, times: Tensor, prompts: PromptEmbeddings, sizes: Tensor
    ) -> Tensor:
        """Run the transformer, told s T, as `Family` says. ``sizes`` is empty."""
        prediction: Tensor = self.network(
            hidden_states=noisy.to(self.dtype),
            encoder_hidden_states=prompts.tokens,
            pooled_projections=prompts.pooled,
            timestep=times,
            return_dict=False,
        )[0]
        return prediction

    def sampler_table(self, sampler: str, steps: int) -> SamplerTable:
        """Return the steps of Euler's method along the flow, as `Family` says."""
        if sampler != "euler":
            raise UserError(
                f"sampler: {sampler} is for models that were trained by DDPM, and "
                f"{self.model.path} was trained by flow matching; leave it out, or set it to euler"
            )
        return flow_table(self._pipeline.scheduler.config, steps)

    def _painter(self) -> StableDiffusion3Pipeline:
        return StableDiffusion3Pipeline(
            transformer=self.network,
            scheduler=type(self._pipeline.scheduler).from_config(self._pipeline.scheduler.config),
            vae=self._pipeline.vae,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )


def _training_scheduler(pipeline: Any, model: ModelConfig) -> FlowMatchEulerDiscreteScheduler:
    """Return a scheduler with the tables of all training steps, nearest to noise first."""
    scheduler = pipeline.scheduler
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise UserError(
            f"model {model.path}: its scheduler is a {type(scheduler).__name__}; training follows "
            "the FlowMatchEulerDiscreteScheduler that the model is published with. "
            "Put that into scheduler/scheduler_config.json"
        )
    if scheduler.config.use_dynamic_shifting:
        raise UserError(
            f"model {model.path}: its scheduler has use_dynamic_shifting, so its noise depends on "
            "the picture's size; training knows a fixed shift. "
            "Set shift and no use_dynamic_shifting in scheduler/scheduler_config.json"
        )
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)


def _num_t5_tokens(pipeline: Any, model: ModelConfig) -> int:
    """Return how many tokens of a prompt the T5 reads; 0 where there is none."""
    if pipeline.text_encoder_3 is not None:
        return model.max_tokens or int(pipeline.tokenizer_max_length)
    if model.max_tokens is not None:
        raise UserError(
            f"model.max_tokens {model.max_tokens}: is for the largest text encoder (T5), which "
            f"{model.path} is loaded without; leave one of the two out"
        )
    return 0


def _version_and_size(config: Any) -> tuple[str, str]:
    """Tell SD3 medium, SD3.5 medium and SD3.5 large apart by the transformer's configuration."""
    if config.qk_norm is None:
        return "3", "medium"
    return "3.5", "medium" if config.dual_attention_layers else "large"
