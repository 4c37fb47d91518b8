"""Feature alignment over a network's layers: the ops, PyTorch with autograd, torch.compile."""

import pytest

from bench.suites import (
    FEATURE_ALIGNMENT,
    FEATURE_ALIGNMENT_ADDED,
    FEATURE_ALIGNMENT_CHANNELS_LAST,
    FEATURE_WORKLOADS,
)

SUITES = (FEATURE_ALIGNMENT, FEATURE_ALIGNMENT_CHANNELS_LAST, FEATURE_ALIGNMENT_ADDED)


@pytest.mark.parametrize("workload", FEATURE_WORKLOADS)
@pytest.mark.parametrize(
    ("suite", "way"),
    [(suite, way) for suite in SUITES for way in suite.makers],
    ids=lambda given: getattr(given, "form", given),
)
def test_feature_alignment(run_way, suite, workload, way):
    run_way(suite, workload, way)


@pytest.mark.parametrize("workload", FEATURE_WORKLOADS)
@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.form)
def test_feature_alignment_in_rotation(run_in_rotation, suite, workload):
    run_in_rotation(suite, workload)
