"""Writes the README's tables anew from bench/results: ``python -m bench.tables``."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import ROOT
from bench.gpu_targets import MAIN_WORKLOAD, list_targets
from bench.option_tables import options_table
from bench.preservation_tables import following_table, preservation_table
from bench.rows import Row, find_row
from bench.step_rows import list_gpu_targets
from bench.step_tables import cpu_step_table, gpu_step_table
from bench.toy2d_tables import toy2d_table

NOT_MEASURED = "not measured"
CPU_WAYS = {
    "anchor_penalty_": "`anchor_penalty_`",
    "foreach": "`torch._foreach` by hand",
    "autograd loop": "autograd loop",
}
CPU_WORKLOADS = ("SDXL, rank 1", "SDXL, rank 4", "SDXL, rank 32")
GPU_WAYS = {
    "AnchoredAdamW, arena": "`AnchoredAdamW`, one arena",
    "AnchoredAdamW": "`AnchoredAdamW`, 1120 tensors",
    "foreach + AdamW(fused), arena": "`foreach` anchor, clip, `AdamW(fused=True)`, one arena",
    "foreach + AdamW(fused)": "`foreach` anchor, clip, `AdamW(fused=True)`, 1120 tensors",
    "foreach + AdamW(foreach)": "`foreach` anchor, clip, `AdamW(foreach=True)`, 1120 tensors",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(arguments)
    text = options.readme.read_text()
    for name, write in BLOCKS.items():
        start, end = markers(name)
        if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
            raise SystemExit(f"{options.readme}: want one line {start} and, below it, one {end}")
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{write(options.results)}\n{end}{rest.partition(end)[2]}"
    options.readme.write_text(text)


def markers(name: str) -> tuple[str, str]:
    """Return the lines of the README that a block of tables stands between."""
    return f"<!-- {name}:start -->", f"<!-- {name}:end -->"


def write_tables(results: Path) -> str:
    """Return the tables as Markdown: the latest CPU results, and the latest of each GPU."""
    parts = [
        anchor_table(_latest(results.glob("cpu-anchor-*.json"))),
        alignment_table(_latest(results.glob("cpu-alignment-*.json"))),
    ]
    steps = _latest(results.glob("cpu-step-*.json"))
    parts.insert(0, cpu_step_table(steps, name_machine(steps)))
    options = _latest(results.glob("*-options-*.json"))
    parts.insert(1, options_table(options, name_machine(options)))
    reports = [json.loads(path.read_text()) for path in latest_by_name(results, "gpu-*.json")]
    parts += [gpu_table(report) for report in reports or [None]]
    return "\n\n".join(parts)


def write_race_tables(results: Path) -> str:
    """Return the tables of the latest race of each model and label, on the CPU and on a GPU."""
    # With pydantic, which a machine that only makes the other tables may not have.
    from bench.race_results import read_race
    from bench.race_tables import race_tables

    tables = []
    for device in ("cpu", "cuda"):
        for path in latest_by_name(results, f"{device}-race-*.json"):
            tables.append(race_tables(read_race(path)))
    return "\n\n".join(tables or [race_tables(None)])


def write_toy2d_table(results: Path) -> str:
    report = _latest(results.glob("cpu-toy2d-*.json"))
    return toy2d_table(report, name_machine(report))


def write_preservation_table(results: Path) -> str:
    following = _latest(results.glob("cpu-prompt-following-*.json"))
    report = _latest(results.glob("cpu-preservation-*.json"))
    return "\n\n".join(
        [
            following_table(following, name_machine(following)),
            preservation_table(report, name_machine(report)),
        ]
    )


# What is written where.
BLOCKS: dict[str, Callable[[Path], str]] = {
    "bench": write_tables,
    "toy2d": write_toy2d_table,
    "preservation": write_preservation_table,
    "race": write_race_tables,
}


def latest_by_name(results: Path, pattern: str) -> list[Path]:
    """Return the latest file of each name: <name>-<year>-<month>-<day>.json."""
    names = {path.stem.rsplit("-", 3)[0]: path for path in sorted(results.glob(pattern))}
    return [names[name] for name in sorted(names)]


def _latest(paths) -> Row | None:
    """Return the report of the last date: names end in it, and ISO dates sort."""
    ordered = sorted(paths, key=lambda path: path.stem)
    return json.loads(ordered[-1].read_text()) if ordered else None


def anchor_table(report: Row | None) -> str:
    rows = report["rows"] if report else []
    lines = [
        "**The anchor alone over SDXL's 1120 adapter tensors, on the CPU** "
        f"({name_machine(report)}):",
        "",
        "| ms, median | " + " | ".join(name.partition(", ")[2] for name in CPU_WORKLOADS) + " |",
        "|---|" + "---|" * len(CPU_WORKLOADS),
    ]
    for way, title in CPU_WAYS.items():
        found = [find_row(rows, suite="anchor", workload=name, way=way) for name in CPU_WORKLOADS]
        lines.append(f"| {title} | " + " | ".join(map(_cpu_cell, found)) + " |")
    return "\n".join(lines)


def _cpu_cell(row: Row | None) -> str:
    if row is None:
        return NOT_MEASURED
    ours = row["way"] == "anchor_penalty_"
    return f"{row['p50 ms']:.1f}" + ("" if ours else f" ({row['times ours']:.1f}x)")


def alignment_table(report: Row | None) -> str:
    """Return a line for each op, form and workload of the report: ours, then the others."""
    lines = [
        "**APT's regularisers on the CPU**, the base's side, the losses and their gradients "
        f"({name_machine(report)}):",
        "",
        "| | op, ms, median | what a trainer would write |",
        "|---|---|---|",
    ]
    by_work: dict[tuple[object, ...], list[Row]] = {}
    for row in report["rows"] if report else []:
        by_work.setdefault((row["suite"], row["form"], row["workload"]), []).append(row)
    for (suite, form, workload), (ours, *others) in by_work.items():
        texts = [f"{row['way']} {row['p50 ms']:.1f} ({row['times ours']:.1f}x)" for row in others]
        lines.append(f"| {suite}, {form}: {workload} | {ours['p50 ms']:.1f} | {', '.join(texts)} |")
    return "\n".join(lines if by_work else [lines[0].removesuffix(":") + "."])


def gpu_table(report: Row | None) -> str:
    rows = report["rows"] if report else []
    lines = [
        f"**Anchor, clip and AdamW over {MAIN_WORKLOAD}, captured in a CUDA graph** "
        f"({name_machine(report)}):",
        "",
    ]
    if rows:
        lines += ["| | ms, median | of the copy bandwidth | extra memory |", "|---|---|---|---|"]
        lines += [_gpu_line(rows, way, title) for way, title in GPU_WAYS.items()]
        lines.append("")
        if steps := gpu_step_table(rows):
            lines += [steps, ""]
    lines += ["| target | wanted | measured |", "|---|---|---|"]
    for target in list_targets(rows) + list_gpu_targets(rows):
        measured = target["measured"]
        text = NOT_MEASURED if measured is None else f"{measured:.2f}"
        lines.append(f"| {target['what']} | {target['target']} | {text} |")
    return "\n".join(lines)


def _gpu_line(rows: Sequence[Row], way: str, title: str) -> str:
    labels = {"suite": "optimizer", "form": "raw", "workload": MAIN_WORKLOAD, "way": way}
    row = find_row(rows, mode="captured", **labels)
    # The memory of an eager call: a captured one allocated its own at the capture.
    eager = find_row(rows, mode="eager", **labels)
    cells = [NOT_MEASURED] * 3
    if row is not None:
        cells[:2] = f"{row['p50 ms']:.3f}", f"{row['share of copy']:.0%}"
    if eager is not None and eager["extra bytes"] is not None:
        cells[2] = f"{eager['extra bytes'] / 1e6:.0f} MB"
    return f"| {title} | " + " | ".join(cells) + " |"


def name_machine(report: Row | None) -> str:
    if report is None:
        return "not measured yet"
    machine = report["machine"]
    if machine["gpu"] is None:
        threads = f"{machine['threads']} thread" + ("" if machine["threads"] == 1 else "s")
        where = f"{machine['cpu']}, {threads}"
    else:
        where = f"{machine['gpu']}, driver {machine['driver']}, triton {machine['triton']}"
    return f"{where}, torch {machine['torch']}, {machine['date']}"


if __name__ == "__main__":
    main()
