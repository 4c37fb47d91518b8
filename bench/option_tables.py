"""The README's table of what each option costs."""

from bench.rows import Row


def options_table(report: Row | None, machine: str) -> str:
    """Return a line for each option: milliseconds of a step, and times those of the plain run."""
    head = "**What each option costs a step**"
    if report is None:
        return f"{head} ({machine})."
    first = report["rows"][0]
    lines = [
        f"{head}: {first['model']} at {first['resolution']} pixels, batch {first['batch']}, rank "
        f"{first['rank']}, engine {first['engine']} ({machine}):",
        "",
        "| over recipe `lora` | ms, median | times the recipe's |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row['way']} | {row['p50 ms']:.1f} | {row['times ours']:.2f} |"
        for row in report["rows"]
    ]
    return "\n".join(lines)
