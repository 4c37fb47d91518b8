"""The pull of feature statistics towards those of the base."""

from fastppt_kernels.feature_alignment.op import feature_alignment_loss, feature_statistics

__all__ = ["feature_alignment_loss", "feature_statistics"]
