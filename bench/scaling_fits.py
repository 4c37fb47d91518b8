"""What a cost follows as one thing grows: a power law, a fixed part and one a unit, or neither.

Both are fitted by least squares to relative errors, so that small costs count as much as large
ones. Which of them holds is said, with how far it is off at worst: an exponent of points that are
no power law is a slope and no law.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from bench.rows import Row
from bench.student import STUDENT

POWER_LAW, FIXED_AND_UNIT, NEITHER = "power law", "fixed and a unit", "neither"
# A law holds where no point is farther off than this, or than the points' own spread.
TOLERANCE = 0.05
# By which the other law must be nearer than a power law, where both hold: less is rounding.
NEARER = 1e-3


@dataclass(frozen=True)
class Fit:
    """Both laws, fitted to one cost.

    Attributes:
        exponent: p of y = factor * x^p, by least squares in log y against log x.
        exponent_half: Half its 95 % interval, Student's t over the residuals with n - 2 degrees
            of freedom; None of two points, which leave none. It knows of no bend: where the law
            does not hold, it is that of the mean slope.
        power_error: |fit / y - 1| at the worst point.
        fixed: a of y = a + b x, by least squares of the relative errors.
        unit: b of it.
        affine_error: |fit / y - 1| at the worst point.
        local_exponents: Between neighbouring points.
        is_power_law: No point is off by more than is allowed, so that the exponent is one.
        law: `POWER_LAW`, `FIXED_AND_UNIT` or `NEITHER`: the nearer one, if it holds.
    """

    exponent: float
    exponent_half: float | None
    power_error: float
    fixed: float
    unit: float
    affine_error: float
    local_exponents: tuple[float, ...]
    is_power_law: bool
    law: str

    def describe(self, unit: str, x: str) -> str:
        """Return a sentence.

        Args:
            unit: Of the cost, such as "s".
            x: What one unit of x is, such as "photo of a batch".
        """
        interval = "" if self.exponent_half is None else f" ± {self.exponent_half:.2f}"
        exponent = f"exponent {self.exponent:.2f}{interval}"
        power = f"power law, {exponent}, within {self.power_error:.1%}"
        if self.law == POWER_LAW:
            return power
        no_power = f"no power law ({exponent} is off by {self.power_error:.0%})"
        if self.law == FIXED_AND_UNIT:
            return (
                f"{self.fixed:.3g} {unit} + {self.unit:.3g} {unit} a {x}, within "
                f"{self.affine_error:.1%}; {power if self.is_power_law else no_power}"
            )
        low, high = min(self.local_exponents), max(self.local_exponents)
        return f"{no_power}: between neighbours the exponent is {low:.2f} to {high:.2f}"

    def row(self, unit: str, x: str) -> Row:
        """Return it as a row of JSON, with the sentence."""
        return {**asdict(self), "local_exponents": list(self.local_exponents)} | {
            "in words": self.describe(unit, x)
        }


def fit(xs: Sequence[float], ys: Sequence[float], spread: float = 0.0) -> Fit:
    """Fit both laws.

    Args:
        xs: At least two different positive numbers, rising.
        ys: What each costs, positive.
        spread: How far the costs themselves are off, relatively; 0 of what is counted.

    Raises:
        ValueError: fewer than two points, an x that does not rise, or a cost that is not positive.
    """
    if len(xs) < 2 or len(xs) != len(ys):
        raise ValueError(f"want as many costs as points, two or more, got {len(xs)} and {len(ys)}")
    if xs[0] <= 0 or any(after <= before for before, after in pairwise(xs)):
        raise ValueError(f"want points that are positive and rise, got {list(xs)}")
    if min(ys) <= 0:
        raise ValueError(f"want costs > 0, got {list(ys)}")
    x, y = np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64)
    exponent, half, power = _fit_power(x, y)
    fixed, unit = _fit_affine(x, y)
    power_error = _worst(power, y)
    affine_error = _worst(fixed + unit * x, y)
    local = tuple(float(p) for p in np.diff(np.log(y)) / np.diff(np.log(x)))
    allowed = max(TOLERANCE, spread)
    law, error = POWER_LAW, power_error
    # A cost that begins below zero, or falls, is no fixed part and no unit's.
    if fixed >= 0 and unit >= 0 and affine_error < power_error - NEARER:
        law, error = FIXED_AND_UNIT, affine_error
    return Fit(
        exponent=exponent,
        exponent_half=half,
        power_error=power_error,
        fixed=fixed,
        unit=unit,
        affine_error=affine_error,
        local_exponents=local,
        is_power_law=power_error <= allowed,
        law=law if error <= allowed else NEITHER,
    )


def _fit_power(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[float, float | None, NDArray[np.float64]]:
    """Return the exponent, half its interval, and the fitted costs."""
    log_x, log_y = np.log(x), np.log(y)
    apart = log_x - log_x.mean()
    square_sum = float(apart @ apart)
    slope = float(apart @ log_y) / square_sum
    fitted = log_y.mean() + slope * apart
    freedom = len(x) - 2
    half = None
    if freedom:
        residuals = log_y - fitted
        error = math.sqrt(float(residuals @ residuals) / freedom / square_sum)
        half = STUDENT[freedom - 1] * error
    return slope, half, np.exp(fitted)


def _fit_affine(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """Return a and b that make the sum of ((a + b x) / y - 1)^2 least."""
    scale = float(x[-1])
    columns = np.stack([1 / y, x / scale / y], axis=1)
    (fixed, slope), *_ = np.linalg.lstsq(columns, np.ones_like(y), rcond=None)
    return float(fixed), float(slope) / scale


def _worst(fitted: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    return float(np.abs(fitted / y - 1).max())
