"""Attention alignment over a network's layers: the ops, materialised maps, torch.compile.

FlexAttention, the other way of a joint attention, has no backward on the CPU: bench.gpu times it.
"""

import pytest

from bench.suites import ATTENTION_ALIGNMENT, ATTENTION_ALIGNMENT_JOINT, JOINT_ATTENTION

# What takes about a second a call on one CPU thread. All layers of the models do not: bench.gpu
# measures them.
WORKLOADS = ("SDXL attention, a layer of each", "SD1.5 attention")
LOGSUMEXP_WORKLOAD = "SD3-M attention, 154 text tokens, a layer"
JOINT_WORKLOAD = "SD3-M attention at 512 px, 154 text tokens, a layer"


@pytest.mark.parametrize("way", ATTENTION_ALIGNMENT.makers)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_attention_alignment(run_way, workload, way):
    run_way(ATTENTION_ALIGNMENT, workload, way)


@pytest.mark.parametrize("way", ATTENTION_ALIGNMENT_JOINT.makers)
def test_attention_alignment_with_a_logsumexp(run_way, way):
    run_way(ATTENTION_ALIGNMENT_JOINT, LOGSUMEXP_WORKLOAD, way)


@pytest.mark.parametrize("way", JOINT_ATTENTION.ways(compiled=False))
def test_joint_attention(run_way, way):
    run_way(JOINT_ATTENTION, JOINT_WORKLOAD, way)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_attention_alignment_in_rotation(run_in_rotation, workload):
    run_in_rotation(ATTENTION_ALIGNMENT, workload)
