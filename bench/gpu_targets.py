"""What is asked of ops and optimizer on a GPU, beside what was measured."""

from collections.abc import Sequence

from bench.attention import count_maps
from bench.rows import Row, describe_target, find_ratio, find_row
from bench.shapes import ATTENTIONS
from bench.suites import ATTENTION_ALIGNMENT_BF16

MAIN_WORKLOAD = "SDXL, rank 32"
# All 36 layers.
MAIN_ATTENTION = "SDXL attention"


def list_targets(rows: Sequence[Row]) -> list[Row]:
    """Return what is asked, beside what was measured."""
    return _list_optimizer_targets(rows) + _list_attention_targets(rows)


def _list_optimizer_targets(rows: Sequence[Row]) -> list[Row]:
    labels = {"workload": MAIN_WORKLOAD, "mode": "captured", "form": "raw", "suite": "optimizer"}
    targets = []
    for kind, suffix in (("in one arena", ", arena"), ("as 1120 tensors", "")):
        what = f"fused anchor+clip+AdamW, {MAIN_WORKLOAD}, {kind}"
        ours = "AnchoredAdamW" + suffix
        row = find_row(rows, way=ours, **labels)
        share = None if row is None else row["share of copy"]
        # The strongest form that a trainer would have: fused, and of its own kind of tensors.
        baseline = "foreach + AdamW(fused)" + suffix
        ratio = find_ratio(rows, ours, baseline, **labels)
        targets.append(describe_target(f"{what}: share of the copy bandwidth", 0.8, share))
        targets.append(describe_target(f"{what}: times faster than {baseline}", 1.3, ratio))
    return targets


def _list_attention_targets(rows: Sequence[Row]) -> list[Row]:
    suite = ATTENTION_ALIGNMENT_BF16
    labels = {"suite": suite.name, "form": suite.form, "workload": MAIN_ATTENTION}
    labels["way"] = "attention_alignment_loss"
    captured, eager = (find_row(rows, mode=mode, **labels) for mode in ("captured", "eager"))
    # A captured call allocated its own at the capture.
    extra_bytes = None if eager is None else eager["extra bytes"]
    map_bytes = 4 * count_maps(ATTENTIONS[MAIN_ATTENTION])
    share = None if extra_bytes is None else extra_bytes / map_bytes
    what = "attention alignment, SDXL's 36 layers: "
    return [
        describe_target(f"{what}ms, at most", 0.6, captured and captured["p50 ms"], at_most=True),
        describe_target(
            f"{what}extra memory over one float32 map set, at most", 0.25, share, at_most=True
        ),
    ]
