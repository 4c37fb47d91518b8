"""A conditional diffusion model of points in the plane: network, schedule, training, sampler."""

import copy
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from bench.toy2d_world import CLASSES, draw_class
from fastppt.families.sampling import ddim_table
from fastppt.objectives.prior_preservation import join_halves, mean_of_halves
from fastppt_kernels import AnchoredAdamW

EMBEDDING, WIDTH = 32, 96
# DDPM's own schedule (arXiv 2006.11239): 1000 steps, betas in a line from 1e-4 to 0.02.
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
SAMPLER_STEPS = 50
PRETRAIN_BATCH, PRETRAIN_RATE = 256, 3e-3
# Draws of a step of personalising, and as many of the class where that is trained on too. Of the
# batches and rates tried, those at which the standard objective fits the subject best.
TUNE_BATCH, TUNE_RATE = 64, 5e-4
# Of the subject's word: of three tried, the one at which prior preservation keeps the other
# classes best.
WORD_RATE = 5e-3


class PointDenoiser(nn.Module):
    """Predicts the noise in points: an MLP on [point, timestep embedding, class embedding]."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(len(CLASSES), EMBEDDING)
        self.layers = nn.Sequential(
            *(nn.Linear(2 + 2 * EMBEDDING, WIDTH), nn.SiLU()),
            *(nn.Linear(WIDTH, WIDTH), nn.SiLU()),
            *(nn.Linear(WIDTH, WIDTH), nn.SiLU()),
            nn.Linear(WIDTH, 2),
        )

    def forward(self, points: Tensor, times: Tensor, embeddings: Tensor) -> Tensor:
        """Return the noise [N, 2] in points [N, 2] at timesteps [N], given embeddings [N, E]."""
        return self.layers(torch.cat([points, _TIMES[times], embeddings], 1))


@dataclass(frozen=True)
class Model:
    """A network, and what it is told of each thing that it draws.

    Attributes:
        network: Predicts noise.
        embeddings: [classes, E], and [classes + 1, E] where a subject was learned: the last row.
    """

    network: PointDenoiser
    embeddings: Tensor

    def predict(self, points: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """Return the predicted noise [N, 2]; the network is not trained."""
        with torch.no_grad():
            return self.network(points, times, self.embeddings[labels])

    def sample(self, labels: Tensor, noise: Tensor) -> Tensor:
        """Return points [N, 2], by DDIM, one of each label, from the noise [N, 2]."""
        table = ddim_table(SCHEDULE, SAMPLER_STEPS)
        points = noise
        for time, keep, push in zip(*(table.times, table.keeps, table.pushes), strict=True):
            predicted = self.predict(points, time.long().expand(len(points)), labels)
            points = float(keep) * points + float(push) * predicted
        return points


@dataclass(frozen=True)
class Way:
    """An objective that a subject is learned by.

    Attributes:
        name: What a reader knows it as.
        prior_weight: Of the loss of class samples; 0 for none.
        anchor_weight: Of the L2 anchor on the network's weights, in the form "raw"; a 0-dim tensor
            is read by the optimizer in each step, also where it is 0.
        holds_word: The anchor is on the subject's word too.
        trains_network: False: the word alone is trained.
    """

    name: str
    prior_weight: float = 0.0
    anchor_weight: float | Tensor = 0.0
    holds_word: bool = False
    trains_network: bool = True

    @property
    def title(self) -> str:
        """Its name, with its weight where it has one."""
        weight = float(self.anchor_weight) or self.prior_weight
        return f"{self.name}, weight {weight:g}" if weight else self.name


def pretrain(steps: int, seed: int) -> Model:
    """Return a model of all classes: DDPM's loss, AdamW, the rate on a cosine to 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PointDenoiser()
    optimizer = torch.optim.AdamW(network.parameters(), PRETRAIN_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    each = steps * PRETRAIN_BATCH // len(CLASSES)
    points = torch.stack([draw_class(label, each, generator) for label in range(len(CLASSES))], 1)
    labels = torch.arange(len(CLASSES)).repeat(PRETRAIN_BATCH // len(CLASSES))
    for batch in points.flatten(0, 1).split(PRETRAIN_BATCH):
        noisy, times, noise = _add_noise(batch, generator)
        loss = (network(noisy, times, network.classes(labels)) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return Model(network.requires_grad_(False), network.classes.weight.detach())


def tune(
    base: Model,
    label: int,
    points: Tensor,
    way: Way,
    *,
    steps: int,
    seed: int,
    class_points: Tensor | None = None,
) -> Model:
    """Return the base, personalised: all weights of its network, and a word for the subject.

    The loss is DDPM's, with prior preservation that of DreamBooth's equation 2 (arXiv 2208.12242);
    the anchor is `AnchoredAdamW`'s. The word's embedding starts as its class's; those of classes
    stay as they are, as a frozen text encoder's do. Ways with one seed draw the same points,
    timesteps and noise of the subject.

    Args:
        base: Not written.
        label: The subject's class.
        points: [n, 2], all that is shown of the subject.
        way: The objective.
        steps: Of the optimizer.
        seed: Of the draws.
        class_points: [m, 2], of the class, as the base draws it; read where ``way`` has a
            ``prior_weight``.
    """
    network = copy.deepcopy(base.network).requires_grad_(way.trains_network)
    word = nn.Parameter(base.embeddings[label].clone())
    weight = way.anchor_weight
    groups = [
        {"params": list(network.layers.parameters()), "anchor_weight": weight},
        {
            "params": [word],
            "lr": WORD_RATE,
            "anchor_weight": weight if way.holds_word else 0.0,
        },
    ]
    optimizer = AnchoredAdamW(groups, TUNE_RATE, weight_decay=0.0)
    draws = torch.Generator().manual_seed(seed)
    class_draws = torch.Generator().manual_seed(seed + 1)
    class_word = base.embeddings[label].expand(TUNE_BATCH, -1)
    for _ in range(steps):
        noisy, times, noise = _draw_batch(points, draws)
        words = word.expand(TUNE_BATCH, -1)
        if way.prior_weight > 0:
            others = _draw_batch(class_points, class_draws)
            noisy, times, noise = map(join_halves, (noisy, times, noise), others)
            words = join_halves(words, class_word)
            losses = (network(noisy, times, words) - noise).square().mean(1)
            subject_loss, class_loss = mean_of_halves(losses)
            loss = subject_loss + way.prior_weight * class_loss
        else:
            loss = (network(noisy, times, words) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    embeddings = torch.cat([base.embeddings, word.detach()[None]])
    return Model(network.requires_grad_(False), embeddings)


def weight_distance(tuned: Model, base: Model) -> float:
    """Return ||theta - theta_0|| over the network's weights."""
    both = (tuned.network.layers.parameters(), base.network.layers.parameters())
    squares = [(a.double() - b.double()).square().sum() for a, b in zip(*both, strict=True)]
    return sum(squares).sqrt().item()


def add_noise(points: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    """Return sqrt(abar_t) z + sqrt(1 - abar_t) e, [N, 2], at timesteps [N]."""
    alphas = _ALPHAS[times][:, None]
    return alphas.sqrt() * points + (1 - alphas).sqrt() * noise


def _draw_batch(points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    chosen = torch.randint(len(points), (TUNE_BATCH,), generator=generator)
    return _add_noise(points[chosen], generator)


def _add_noise(points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return points at drawn timesteps, these, and the drawn noise in them."""
    times = torch.randint(len(_ALPHAS), (len(points),), generator=generator)
    noise = torch.randn(points.shape, generator=generator)
    return add_noise(points, times, noise), times, noise


def _embed_times() -> Tensor:
    """Return cosines and sines [T, EMBEDDING] of all timesteps, as in DDPM."""
    rates = 1e4 ** -(torch.arange(EMBEDDING // 2) / (EMBEDDING // 2))
    angles = torch.arange(len(_ALPHAS))[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], 1)


_ALPHAS = DDIMScheduler.from_config(SCHEDULE).alphas_cumprod
_TIMES = _embed_times()
