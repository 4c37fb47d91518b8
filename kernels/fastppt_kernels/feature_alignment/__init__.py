"""The pull of feature statistics towards those of the base."""

from fastppt_kernels.feature_alignment.op import (
    align_features,
    feature_alignment_loss,
    feature_statistics,
)

__all__ = ["align_features", "feature_alignment_loss", "feature_statistics"]
