"""The step bench's rows: how they are printed, and what is asked of them."""

from collections.abc import Sequence

from bench.rows import Row, describe_target, find_ratio, find_row

SUITE = "step"
PEER, CACHED_PEER = "diffusers-style, eager", "diffusers-style, latents cached, eager"
# Of the steps that the GPU's targets speak of; those of the CPU may have any resolution.
MAIN = {"suite": SUITE, "model": "sdxl", "resolution": 1024, "batch": 1, "rank": 32}
APT_COST = "recipe apt's step - recipe apt-base's, in base passes"
CPU_MAIN = {"suite": SUITE, "model": "mini-sdxl", "batch": 1, "rank": 32}


def describe_work(row: Row) -> str:
    """Return what a row's step trains on, such as "sdxl, 1024 pixels, batch 1, rank 32"."""
    return f"{row['model']}, {row['resolution']} pixels, batch {row['batch']}, rank {row['rank']}"


def print_steps(rows: Sequence[Row]) -> None:
    """Print the rows of one workload."""
    if rows:
        print(describe_work(rows[0]))
    for row in rows:
        line = (
            f"  {row['way']:<44} {row['p50 ms']:9.2f} ms ({row['p20 ms']:.2f} to "
            f"{row['p80 ms']:.2f})  x{row['times ours']:.2f}  first step {row['first step s']:.2f} "
            f"s, {row['share of product']:.0%} of a product"
        )
        if row["capture s"] > 1:
            line += f", captured in {row['capture s']:.1f} s"
        if row["network share"] is not None:
            line += f", network alone {row['network share']:.0%}"
        if row["kernels"] is not None:
            line += f", {row['kernels']} launches"
        if row["peak bytes"] is not None:
            line += f", {row['peak bytes'] / 1e9:.2f} GB"
        print(line)


def print_base_passes(rows: Sequence[Row]) -> None:
    """Print what base and tuned pass cost together, way by way."""
    for row in rows:
        print(
            f"  base pass, {describe_work(row)}: {row['way']:<10} {row['p50 ms']:9.2f} ms, "
            f"{row['kept bytes'] / 1e6:.1f} MB kept for the backward pass"
        )


def list_cpu_targets(rows: Sequence[Row]) -> list[Row]:
    """Return how many times faster than the peers our eager step is on the CPU, and APT's cost."""
    targets = []
    for row in rows:
        labels = CPU_MAIN | {"resolution": row["resolution"]}
        if row["way"] != "lora, eager" or find_row([row], **labels) is None:
            continue
        for peer, kind in ((PEER, "as it is"), (CACHED_PEER, "with latents cached")):
            what = f"{describe_work(row)}: times faster than diffusers' step {kind}"
            ratio = find_ratio(rows, "lora, eager", peer, **labels)
            targets.append(describe_target(what, 1.3, ratio))
        cost = _apt_cost(rows, "eager", labels)
        if cost is not None:
            what = f"{describe_work(row)}: {APT_COST}, at most"
            targets.append(describe_target(what, 1.25, cost, at_most=True))
    return targets


def _apt_cost(rows: Sequence[Row], engine: str, labels: Row) -> float | None:
    """Return what APT adds to a step of its trainables, in base passes; None: not measured."""
    base, plain, apt = (
        find_row(rows, way=f"{name}, {engine}", **labels)
        for name in ("base pass alone", "apt-base", "apt-recipe")
    )
    if base is None or plain is None or apt is None:
        return None
    return float((apt["p50 ms"] - plain["p50 ms"]) / base["p50 ms"])


def list_gpu_targets(rows: Sequence[Row]) -> list[Row]:
    """Return what is asked of SDXL's step on a GPU, beside what was measured."""
    lora, anchored, apt, base, compiled = (
        find_row(rows, way=way, **MAIN)
        for way in (
            *("lora, graph", "ppt-lora, graph", "apt, graph", "base pass alone, graph"),
            "lora, graph+compile",
        )
    )
    ratio = find_ratio(rows, "lora, graph", PEER, **MAIN)
    anchor = find_ratio(rows, "lora, graph", "ppt-lora, graph", **MAIN)
    cost = peak = None
    if lora and apt and base:
        cost = (apt["p50 ms"] - lora["p50 ms"]) / base["p50 ms"]
    if lora and apt:
        peak = apt["peak bytes"] / lora["peak bytes"]
    name = "SDXL at 1024 pixels, rank 32, in a graph"
    limits = [
        (f"{name}: ms", 55.0, lora and lora["p50 ms"]),
        (f"{name}, blocks compiled: ms", 45.0, compiled and compiled["p50 ms"]),
        (f"{name}: anchored step / plain step", 1.01, anchored and anchor),
        (f"{name}: APT's step - plain step, in base passes", 1.15, cost),
        (f"{name}: {APT_COST}", 1.15, _apt_cost(rows, "graph", MAIN)),
        (f"{name}: peak memory, APT / plain", 1.05, peak),
    ]
    return [
        describe_target(f"{name}: times faster than diffusers' step", 2.5, ratio),
        *(
            describe_target(f"{what}, at most", limit, measured, at_most=True)
            for what, limit, measured in limits
        ),
    ]
