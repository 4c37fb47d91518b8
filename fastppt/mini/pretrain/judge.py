"""How the judge is trained: on rendered scenes alone."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastppt.mini.judge import Judge, Verdict
from fastppt.mini.pretrain.scenes import VIEWS, Scenes
from fastppt.mini.pretrain.training import CPU, Deadline, Schedule, train

SCHEDULE = Schedule(num_steps=2500, learning_rate=2e-3, weight_decay=0.02)

NUM_WORLD, NUM_SUBJECTS = 40, 10
"""Scenes of the world in a batch, and subjects, each in all its scenes but one."""

TEMPERATURE = 0.1
"""Of the cosines in the loss of identity."""


def train_judge(
    world: Scenes, subjects: Scenes, work: Path, deadline: Deadline, device: torch.device = CPU
) -> Judge:
    """Train the judge, or go on with it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = Judge()
    groups = len(subjects.pixels) // VIEWS

    def loss_of(generator: torch.Generator) -> Tensor:
        plain = torch.randint(len(world.pixels), (NUM_WORLD,), generator=generator).numpy()
        chosen = torch.randperm(groups, generator=generator)[:NUM_SUBJECTS]
        views = torch.rand(NUM_SUBJECTS, VIEWS, generator=generator).argsort(1)[:, 1:]
        shown = (chosen[:, None] * VIEWS + views).flatten().numpy()
        pixels = np.concatenate([world.pixels[plain], subjects.pixels[shown]])
        with torch.autocast(device.type, torch.bfloat16):
            verdict = judge(_disturbed(as_tensor(pixels), generator).to(device))
        identities = torch.from_numpy(subjects.subjects[shown]).to(device)
        return _heads_loss(verdict, world, plain, subjects, shown) + identity_loss(
            verdict.embedding[NUM_WORLD:].float(), identities
        )

    train("judge", {"judge": judge}, loss_of, SCHEDULE, work, deadline, seed=1, device=device)
    return judge


def identity_loss(embedding: Tensor, subjects: Tensor) -> Tensor:
    """Pull pictures of one subject together and push all others away.

    L = -mean over pairs (i, j) of one subject of log softmax_j(e_i . e_j / temperature), j != i

    Source: supervised contrastive learning (arXiv 2004.11362), L_out.

    Args:
        embedding: Unit vectors [B, D], float32.
        subjects: Which subject each shows, [B].
    """
    cosines = embedding @ embedding.T / TEMPERATURE
    itself = torch.eye(len(subjects), dtype=torch.bool, device=subjects.device)
    logs = F.log_softmax(cosines.masked_fill(itself, float("-inf")), dim=1)
    same = (subjects[:, None] == subjects[None]) & ~itself
    return -logs[same].mean()


def as_tensor(pixels: np.ndarray) -> Tensor:
    """8-bit pictures [B, H, W, 3] as float32 [B, 3, H, W] in -1 to 1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def _heads_loss(
    verdict: Verdict, world: Scenes, plain: np.ndarray, subjects: Scenes, shown: np.ndarray
) -> Tensor:
    """Cross entropies; a subject's colour has no name."""

    def both(name: str) -> Tensor:
        truth = np.concatenate([getattr(world, name)[plain], getattr(subjects, name)[shown]])
        return torch.from_numpy(truth).to(verdict.nouns.device)

    return (
        F.cross_entropy(verdict.nouns.float(), both("nouns"))
        + F.cross_entropy(verdict.colors.float(), both("colors"), ignore_index=-1)
        + F.cross_entropy(verdict.contexts.float(), both("contexts"))
        + F.cross_entropy(verdict.styles.float(), both("styles"))
    )


def _disturbed(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, blur and add noise: generated pictures are less crisp than rendered ones."""
    count = len(pictures)
    mirrored = torch.rand(count, generator=generator) < 0.5
    pictures = torch.where(mirrored[:, None, None, None], pictures.flip(3), pictures)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(count, 1, 1, 1, generator=generator)
    share = share * (torch.rand(count, 1, 1, 1, generator=generator) < 0.5)
    pictures = pictures + share * (blurred - pictures)
    strength = 0.12 * torch.rand(count, 1, 1, 1, generator=generator)
    return pictures + strength * torch.randn(pictures.shape, generator=generator)
