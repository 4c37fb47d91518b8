"""Student's t: a mean of several seeds and its interval."""

import math
import statistics
from collections.abc import Sequence

# The 97.5 % quantiles of Student's t distribution, by degrees of freedom from 1 on.
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093),
)
MOST_SEEDS = len(STUDENT) + 1


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean, and half the width of its 95 % interval: t_{0.975, n-1} s / sqrt(n).

    Source: Student's t, for values that are about normal. None where there is one value.
    """
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None
    quantile = STUDENT[len(values) - 2]
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))
