"""The judge: a small network that reads what a picture of the mini world shows.

It was trained on rendered scenes alone, never on a generated picture, so it has learned nothing of
any model. One model has learned of it: the decoder of mini-sdxl was trained to bring back the
judge's lower feature maps of a scene, beside its pixels. What the judge gets right on scenes held
out from its training is tested.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastppt.errors import UserError
from fastppt.mini.world import COLORS, NOUNS, PLACES, STYLES

WEIGHTS = Path(__file__).parent / "weights" / "judge.safetensors"
"""The trained judge, float16."""

EMBEDDING_WIDTH = 64
"""Numbers that say which subject a picture shows."""

WIDTHS = (32, 64, 112)
"""Channels at 32x32, 16x16 and 8x8."""

FEATURE_WIDTH = 2 * WIDTHS[-1]
"""Mean and maximum over space of the last channels."""


@dataclass(frozen=True)
class Verdict:
    """What the judge reads in B pictures.

    Attributes:
        nouns: Logits over `NOUNS`, [B, 16].
        colors: Over `COLORS`, [B, 8].
        contexts: Over `PLACES`, [B, 10].
        styles: Over `STYLES`, [B, 3].
        embedding: Of unit length, [B, `EMBEDDING_WIDTH`]: the cosine of two says how surely they
            show the same subject.
        features: [B, `FEATURE_WIDTH`], the space in which distributions are compared.
    """

    nouns: Tensor
    colors: Tensor
    contexts: Tensor
    styles: Tensor
    embedding: Tensor
    features: Tensor


class Judge(nn.Module):
    """A residual network of 0.4 M parameters with a head for each question."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_convolution(3, WIDTHS[0], 5, stride=2), _Residual(WIDTHS[0])]
        for narrow, wide in pairwise(WIDTHS):
            layers += [_convolution(narrow, wide, 3, stride=2), _Residual(wide)]
        self.layers = nn.ModuleList(layers)
        self.noun = nn.Linear(FEATURE_WIDTH, len(NOUNS))
        self.color = nn.Linear(FEATURE_WIDTH, len(COLORS))
        self.context = nn.Linear(FEATURE_WIDTH, len(PLACES))
        self.style = nn.Linear(FEATURE_WIDTH, len(STYLES))
        self.identity = nn.Sequential(
            nn.Linear(FEATURE_WIDTH, 128), nn.ReLU(), nn.Linear(128, EMBEDDING_WIDTH)
        )

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """Return the feature maps at 32x32, 16x16 and 8x8 of pictures as `forward` takes them."""
        maps = []
        for layer in self.layers:
            pictures = layer(pictures)
            if isinstance(layer, _Residual):
                maps.append(pictures)
        return maps

    def forward(self, pictures: Tensor) -> Verdict:
        """Read pictures.

        Args:
            pictures: [B, 3, 64, 64] in -1 to 1.
        """
        last = self.maps(pictures)[-1]
        features = torch.cat([last.mean((2, 3)), last.amax((2, 3))], dim=1)
        return Verdict(
            self.noun(features),
            self.color(features),
            self.context(features),
            self.style(features),
            nn.functional.normalize(self.identity(features), dim=1),
            features,
        )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _convolution(width, width, 3)
        self.second = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(features + self.second(self.first(features)))


def _convolution(width_in: int, width_out: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, size, stride=stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(width_out),
        nn.ReLU(),
    )


@cache
def load_judge() -> Judge:
    """Load the trained judge, float32, on the CPU, in evaluation mode.

    Raises:
        UserError: its file is not there, or damaged.
    """
    judge = Judge()
    try:
        judge.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"judge: {WEIGHTS} cannot be loaded ({reason}); install the package again"
        ) from error
    return judge.eval().requires_grad_(False)
