"""What can move in a stage, and with which settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fastppt.config_types import FilePath, Section

Patterns = Annotated[list[str], Field(min_length=1)]


class TrainableConfig(Section):
    """What all trainables have."""

    learning_rate: Annotated[float, Field(ge=0)] = 1e-4
    """Learning rate of what moves."""

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates, by the part that each is of; "" is the main one."""
        return {"": self.learning_rate}


class LoraConfig(TrainableConfig):
    """Low-rank adapters on attention projections (Hu et al., arXiv 2106.09685): W + alpha/rank
    * B A.
    """

    rank: Annotated[int, Field(ge=1)] = 32
    """Inner dimension of the adapters."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Strength: the product B A is scaled by alpha / rank; unset means alpha = rank."""
    learning_rate: Annotated[float, Field(ge=0)] = 1e-4
    """Learning rate of the adapters."""
    targets: list[str] | Literal["up"] | None = None
    """Patterns of the attention projections that get an adapter, such as `*.to_q`; * matches any
    text, dots included. "up" takes those of the second half of the network (a UNet's up blocks),
    where the backward pass can stop early. Unset takes them all."""
    init: FilePath | None = None
    """LoRA file, or folder of a finished run, to start from; unset starts from zero."""

    @field_validator("targets", mode="before")
    @classmethod
    def _check_targets(cls, targets: object) -> object:
        is_list = isinstance(targets, list) and all(isinstance(each, str) for each in targets)
        if targets is None or targets == "up" or (is_list and targets):
            return targets
        raise ValueError(f'must be "up" or a list of patterns, got {targets!r}')


class AdapterConfig(TrainableConfig):
    """What the adapters that are those of the peft library have in common."""

    targets: Patterns | None = None
    """Patterns of the attention projections that get an adapter, such as `*.to_q`; * matches any
    text, dots included. Unset takes them all."""


class DoraConfig(AdapterConfig):
    """Weight-decomposed low-rank adapters (Liu et al., arXiv 2402.09353)."""

    rank: Annotated[int, Field(ge=1)] = 32
    """Inner dimension of the adapters."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Strength: the product B A is scaled by alpha / rank; unset means alpha = rank."""


class LohaConfig(AdapterConfig):
    """Hadamard products of two low-rank matrices (Hyeon-Woo et al., arXiv 2108.06098)."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Inner dimension of either matrix."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Strength: the product is scaled by alpha / rank; unset means alpha = rank."""


class LokrConfig(AdapterConfig):
    """Kronecker products of two small matrices (Yeh et al., arXiv 2309.14859)."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Inner dimension of the larger factor, which is whole where that is no smaller."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Strength: the product is scaled by alpha / rank; unset means alpha = rank."""
    decompose_factor: Annotated[int, Field(ge=1)] | None = None
    """Largest side of the smaller factor; unset cuts each side of a weight as near to its root as
    can be."""


class OftConfig(AdapterConfig):
    """Orthogonal fine-tuning: each block of a weight's inputs is rotated (Qiu et al., arXiv
    2306.07280).
    """

    block_size: Annotated[int, Field(ge=2)] | None = None
    """Inputs of a block, by which the width of what is rotated must be divisible; unset takes 32,
    or what num_blocks says."""
    num_blocks: Annotated[int, Field(ge=1)] | None = None
    """Blocks of each weight, whatever its width, instead of block_size."""
    constraint: Annotated[float, Field(gt=0)] | None = None
    """Furthest that a rotation may go, as the method's constrained variant (COFT) has it: its skew
    matrix Q is held to ||Q|| <= constraint * block size^2 / sqrt(blocks); unset does not hold
    it."""

    @model_validator(mode="after")
    def _check_blocks(self) -> OftConfig:
        if self.block_size is not None and self.num_blocks is not None:
            raise ValueError("block_size and num_blocks say the same in two ways: leave one out")
        return self


class BoftConfig(AdapterConfig):
    """Orthogonal fine-tuning by products of sparse rotations, and a factor for each output (Liu et
    al., arXiv 2311.06243).
    """

    block_size: Annotated[int, Field(ge=2)] = 4
    """Inputs of a block; block_size * 2^(factors - 1) must divide the width of what is rotated."""
    factors: Annotated[int, Field(ge=1)] = 1
    """Rotations that are multiplied, each over blocks of inputs twice as far apart."""


class NetworkWeightsConfig(TrainableConfig):
    """What trainables made of the network's own weights have in common."""

    master_weights: bool = True
    """Keep float32 values beside a network in 16 bits, and round the network from them. Without,
    the network's own values are trained, each update rounded up or down at random so that small
    ones are not lost: half the memory of weights and gradients (of fp16 three fifths), and less
    exact."""


class FullConfig(NetworkWeightsConfig):
    """The network's own weights (DreamBooth, Ruiz et al., arXiv 2208.12242)."""

    learning_rate: Annotated[float, Field(ge=0)] = 5e-6
    """Learning rate of the weights."""
    targets: Patterns | None = None
    """Patterns of the parameters that move, such as `up_blocks.*`; * matches any text, dots
    included. Unset takes them all."""


class CustomDiffusionConfig(NetworkWeightsConfig):
    """The cross-attentions' key and value projections (Custom Diffusion, Kumari et al., arXiv
    2212.04488).
    """

    learning_rate: Annotated[float, Field(ge=0)] = 1e-5
    """Learning rate of the weights."""


class SvdiffConfig(TrainableConfig):
    """Shifts of the singular values of the network's weights (SVDiff, Han et al., arXiv
    2303.11305).
    """

    learning_rate: Annotated[float, Field(ge=0)] = 1e-3
    """Learning rate of the shifts of matrices and convolutions."""
    learning_rate_1d: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate of the shifts of vectors: the weights of norms."""
    targets: Patterns | None = None
    """Patterns of the weights whose singular values move, such as `*.attn2.*`; * matches any text,
    dots included. Unset takes them all."""

    @property
    def rates(self) -> dict[str, float]:
        """Those of matrices, and of vectors."""
        return {"": self.learning_rate, "1d": self.learning_rate_1d}


class TextEncoderLoraConfig(TrainableConfig):
    """Low-rank adapters on the attention projections of the CLIP text encoders."""

    rank: Annotated[int, Field(ge=1)] = 32
    """Inner dimension of the adapters."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Strength: the product B A is scaled by alpha / rank; unset means alpha = rank."""
    learning_rate: Annotated[float, Field(ge=0)] = 5e-6
    """Learning rate of these adapters."""


class TokensConfig(TrainableConfig):
    """Embeddings of a new word, learned in every CLIP text encoder (Textual Inversion, arXiv
    2208.01618).
    """

    vectors: Annotated[int, Field(ge=1)] = 1
    """Embeddings that the word is made of."""
    init: Annotated[str, Field(min_length=1)] | None = None
    """Words whose embeddings the new ones start from, one by one where they are as many tokens as
    vectors, else all from their mean; unset takes the class noun."""
    learning_rate: Annotated[float, Field(ge=0)] = 5e-4
    """Learning rate of the embeddings."""
    keep_norm: bool = False
    """Scale each embedding back to the length of what `init` gives, after every step."""


ADAPTER_TRAINABLES = ("lora", "dora", "loha", "lokr", "oft", "boft")
"""What adds to the network's attention projections."""

NETWORK_TRAINABLES = (
    *ADAPTER_TRAINABLES,
    *("full", "custom_diffusion", "svdiff"),
)
"""What moves in the network, of which a run has one at most."""


class TrainablesConfig(Section):
    """What moves in a stage."""

    lora: LoraConfig | None = None
    dora: DoraConfig | None = None
    loha: LohaConfig | None = None
    lokr: LokrConfig | None = None
    oft: OftConfig | None = None
    boft: BoftConfig | None = None
    full: FullConfig | None = None
    custom_diffusion: CustomDiffusionConfig | None = None
    svdiff: SvdiffConfig | None = None
    text_encoder_lora: TextEncoderLoraConfig | None = None
    tokens: TokensConfig | None = None

    @property
    def given(self) -> dict[str, TrainableConfig]:
        """The tables that are there, by name, in their order."""
        tables = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: table for name, table in tables.items() if table is not None}

    @property
    def network(self) -> str | None:
        """Name of what moves in the network; None where nothing does."""
        return next((name for name in self.given if name in NETWORK_TRAINABLES), None)

    @property
    def network_weights(self) -> NetworkWeightsConfig | None:
        """What moves of the network's own weights."""
        return self.full or self.custom_diffusion

    @property
    def move_text(self) -> bool:
        """Say whether what a prompt is encoded to changes during training."""
        return self.text_encoder_lora is not None or self.tokens is not None

    @model_validator(mode="after")
    def _check_network(self) -> TrainablesConfig:
        names = [name for name in self.given if name in NETWORK_TRAINABLES]
        if len(names) > 1:
            raise ValueError(
                f"{' and '.join(names)} all move the network, and one can at a time: leave one"
            )
        return self
