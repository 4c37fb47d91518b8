"""The README's tables of steps."""

from collections.abc import Sequence

from bench.rows import Row, find_row

NOT_MEASURED = "not measured"
# What a table has a line for, under the name that a reader knows.
CPU_LINES = {
    "lora, eager": "recipe `lora`",
    "ppt-lora, eager": "recipe `ppt-lora`",
    "apt, eager": "APT's objectives over `lora`",
    "apt-base, eager": "recipe `apt-base`",
    "apt-recipe, eager": "recipe `apt`",
    "diffusers-style, eager": "diffusers' step",
    "diffusers-style, latents cached, eager": "diffusers' step, its latents cached",
    "diffusers-style, prior preservation, eager": "diffusers' step with prior preservation",
    "network alone, eager": "the network alone, forward and backward",
}
MODELS = {"sdxl": "SDXL", "sd3-medium": "SD3-M", "sd15": "SD1.5"}
Work = tuple[str, int, int]


def cpu_step_table(report: Row | None, machine: str) -> str:
    """Return the table of eager steps: a column for each model, resolution and batch size."""
    rows = report["rows"] if report else []
    works = _list_works(rows)
    head = f"**One training step on the CPU, rank 32** ({machine})"
    if not works:
        return f"{head}."
    lines = [
        f"{head}, and how many times as long as recipe `lora`:",
        "",
        "| ms, median | " + " | ".join(f"{m}, {r} px, batch {b}" for m, r, b in works) + " |",
        "|---|" + "---|" * len(works),
    ]
    for way, title in CPU_LINES.items():
        cells = [_cell(_find(rows, work, way), with_ratio=way != "lora, eager") for work in works]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gpu_step_table(rows: Sequence[Row]) -> str:
    """Return a line for each way of each full-size model at batch 1; "" where there is none."""
    works = [work for work in _list_works(rows) if work[0] in MODELS and work[2] == 1]
    if not works:
        return ""
    lines = [
        "| one step, batch 1, rank 32 | ms, median | kernels | peak memory | of a product |",
        "|---|---|---|---|---|",
    ]
    for work in works:
        model, resolution, _ = work
        seen = set()
        for row in _of(rows, work):
            if row["way"] in seen:
                continue
            seen.add(row["way"])
            lines.append(
                f"| {MODELS[model]}, {resolution} px: {row['way']} | {row['p50 ms']:.1f} | "
                f"{row['kernels']} | {row['peak bytes'] / 1e9:.1f} GB | "
                f"{row['share of product']:.0%} |"
            )
    return "\n".join(lines)


def _list_works(rows: Sequence[Row]) -> list[Work]:
    steps = [row for row in rows if row["suite"] == "step" and row["rank"] == 32]
    return list(dict.fromkeys((r["model"], r["resolution"], r["batch"]) for r in steps))


def _of(rows: Sequence[Row], work: Work) -> list[Row]:
    model, resolution, batch_size = work
    labels = {"model": model, "resolution": resolution, "batch": batch_size, "rank": 32}
    return [row for row in rows if find_row([row], suite="step", **labels)]


def _find(rows: Sequence[Row], work: Work, way: str) -> Row | None:
    return find_row(_of(rows, work), way=way)


def _cell(row: Row | None, *, with_ratio: bool) -> str:
    if row is None:
        return NOT_MEASURED
    return f"{row['p50 ms']:.1f}" + (f" ({row['times ours']:.2f}x)" if with_ratio else "")
