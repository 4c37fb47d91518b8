"""What the run's seed is split into, so that no two kinds of chance share a stream."""

from __future__ import annotations

import numpy as np

ADAPTER_STREAM, STEP_STREAM, BUCKET_STREAM, VIEW_STREAM, TEXT_ADAPTER_STREAM = range(5)
CLASS_STREAM, ROUNDING_STREAM = 5, 6


def split_seed(seed: int, stream: int) -> int:
    """Return the seed of one stream of chance: streams of one run are independent."""
    return int(np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0] >> 1)
