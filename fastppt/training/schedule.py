"""The course of the learning rate over a stage."""

import math

from fastppt.stage_config import StageConfig


def learning_rate_factor(stage: StageConfig, step: int) -> float:
    """Return the factor of the learning rate at a step, counted from 0.

    It rises linearly over the warm-up, then stays, or falls to zero at the end of the stage
    linearly or along half a cosine (SGDR, arXiv 1608.03983, eq. 5).
    """
    if step < stage.warmup_steps:
        return (step + 1) / (stage.warmup_steps + 1)
    done = (step - stage.warmup_steps) / (stage.steps - stage.warmup_steps)
    match stage.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - done
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
