"""What a step notes, by name: the columns of its metrics.

A name with a slash is one of many of its kind: ``TERM/LAYER``, ``gamma/bin_N``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastppt.stage_config import ObjectivesConfig, StageConfig

METRICS = ("loss", "denoising", "anchor", "grad_norm", "learning_rate", "skipped", "bad")
"""What every step notes; `metric_names` adds what a run's objectives have.

`skipped` is 1 where the update was left out, `bad` where loss or gradient are not finite through no
doing of float16's loss scale.
"""

LAYER_TERMS = ("feature_mean", "feature_std", "attention_alignment")
"""Terms that are sums over layers; each layer's part is noted too."""


def loss_names(objectives: ObjectivesConfig) -> tuple[str, ...]:
    """Return what a pass computes: the weighted sum of its terms, then each term unweighted.

    The anchor is not among them: the optimizer computes it. `denoising` is noted whether or not it
    is an objective. `prediction_difference`, the last, is no term: the mean squared difference of
    tuned and base prediction.
    """
    names = ["loss", "denoising"]
    if objectives.adaptive:
        names.append("gamma")
    if objectives.feature_alignment is not None:
        names += ["feature_mean", "feature_std"]
    if objectives.attention_alignment is not None:
        names.append("attention_alignment")
    if objectives.prior_preservation is not None:
        names.append("prior_preservation")
    if objectives.direct_consistency is not None:
        names.append("direct_consistency")
    if objectives.need_base:
        names.append("prediction_difference")
    return tuple(names)


def layer_loss_names(layers: Iterable[str], attentions: Iterable[str]) -> tuple[str, ...]:
    """Return the names of `Step.layer_losses`.

    Args:
        layers: Paths of those with feature alignment.
        attentions: Paths of those with attention alignment.
    """
    paths = {"feature_mean": layers, "feature_std": layers, "attention_alignment": attentions}
    return tuple(f"{term}/{path}" for term in LAYER_TERMS for path in paths[term])


def bin_names(objectives: ObjectivesConfig) -> tuple[str, ...]:
    """Return the names of the indicator's values by timestep bin; none where it is not asked."""
    denoising = objectives.denoising
    num_bins = denoising.bins if objectives.adaptive and denoising is not None else 0
    return tuple(f"gamma/bin_{number}" for number in range(num_bins))


def metric_names(stages: Sequence[StageConfig]) -> tuple[str, ...]:
    """Return the columns of the metric ring of a run with these stages."""
    names = [name for stage in stages for name in loss_names(stage.objectives)]
    return tuple(dict.fromkeys([*METRICS, *names]))


def by_layer_of(term: str) -> str:
    """Return the name of what a term is the sum of."""
    return f"{term}_by_layer"
