"""Scaling and roofline on the report's page."""

from pathlib import Path

from bench.race_tables import format_number
from bench.report_html import Html, details, element, join, picture, table
from bench.rows import Row
from bench.tables import name_machine

# As `bench.scaling_axes` calls them, which imports the whole trainer.
STEP, RUNS = "a step", "runs in turn"
ABOUT_SCALING = (
    "One thing grows at a time, and all else stays as it is said here. Exponent: by how much a "
    "cost grows with it, relatively; 1 is in proportion, 0 not at all; ± is half its 95 % interval."
)
# Of what is measured in whole runs.
ABOUT_RUNS = "Whole runs, from the model's load to the saved files, without the process's start."
ABOUT_SUBJECTS = (
    "Costs of several subjects are sums of the same runs, which scatter together: the intervals of "
    "these exponents are narrower than they should be."
)
ABOUT_ROOFLINE = (
    "How near each phase of a job comes to what the machine can do: its fastest square matrix "
    "product, and a large copy."
)
# What the columns of phases are.
ABOUT_PHASES = (
    "TFLOP: counted operations of products, convolutions and attentions, a multiplication and an "
    "addition being two; a weight that is not trained has no gradient, and none is counted; scores "
    "that fused attention computes again in its backward pass are. GB, op by op: what every "
    "operator reads and writes, so that caches can make it faster than a copy, over 100 %. GB, at "
    "least: what any way must move. MFU: the operations a second over those of the product. Of the "
    "roof: the longer of what product and copy would take for it, over the time taken."
)

# Of a scaling's costs: unit shown, factor into it, and its key in a row.
COSTS = {
    "seconds": ("s", 1.0, "p50 s"),
    "flops": ("TFLOP", 1e-12, "flops"),
    "bytes": ("GB", 1e-9, "peak bytes"),
}
# Of a kernel or a family of them.
TAKEN = ("ms", "of the step", "calls")


def scaling_section(report: Row, folder: Path) -> Html:
    """Return a part for each axis: what its points follow, its picture, the points.

    Args:
        report: Of `bench.scaling`.
        folder: Where its pictures lie.

    Raises:
        ValueError: one of them does not; names it.
    """
    parts = [element("p", ABOUT_SCALING), describe_settings(report)]
    for axis in report["axes"]:
        title = f"Cost of {axis['of']} by {axis['x']}"
        parts += [element("h3", title), *(element("p", text) for text in _notes(axis))]
        parts.append(_fits(axis))
        if axis.get("picture"):
            path = folder / axis["picture"]
            if not path.is_file():
                raise ValueError(f"{path}: no such picture; bench.scaling left it beside its JSON")
            parts.append(picture(path, title))
        for row in axis["refused"]:
            parts.append(element("p", f"{row['label']}: {row['refused']}", class_="warning"))
        parts.append(details("The points", _points(axis)))
    return join(*parts)


def roofline_section(report: Row) -> Html:
    """Return ceilings, phases against them, and where the time of a step goes."""
    ceilings, again = report["ceilings"], report["ceilings at the end"]
    names = {
        "product tflop/s": "products, TFLOP/s",
        "copy gb/s": "copy, GB/s",
        "ridge flop/byte": "where they meet, FLOP a byte",
    }
    roofs = [[text, f"{ceilings[key]:.3g}", f"{again[key]:.3g}"] for key, text in names.items()]
    profile = report["profile"]
    took = format_number(1e3 * profile["profiled step s"])
    profiled = (
        f"A profiled step by families of kernels: {profile['engine']}, {took} ms, of which the "
        "profiler itself takes some"
    )
    families = [[row["family"], *_taken(row)] for row in profile["families"] if row["s"] > 0]
    return join(
        element("p", ABOUT_ROOFLINE),
        describe_settings(report),
        table(["measured in the same run", "at its start", "at its end"], roofs),
        _phases(report),
        element("p", ABOUT_PHASES, class_="note"),
        table(["", *TAKEN], families, caption=profiled),
        details("The largest kernels", _largest(profile["top"])),
    )


def describe_settings(report: Row) -> Html:
    """Return what the numbers were measured with."""
    given = [f"{key.replace('_', ' ')} {value}" for key, value in report["settings"].items()]
    text = ", ".join(text for text in given if not text.endswith(" None"))
    return element("p", f"{text} ({name_machine(report)}).")


def _notes(axis: Row) -> list[str]:
    """Return what must be known to read an axis."""
    notes = [ABOUT_RUNS] * (axis["of"] != STEP) + [ABOUT_SUBJECTS] * (axis["of"] == RUNS)
    if axis["drift"] is not None:
        notes.append(f"A large product ran {axis['drift']:.2f} times as fast after it as before.")
    return notes


def _fits(axis: Row) -> Html:
    rows = [[f"{f['recipe']}, {f['what']}", f["in words"]] for f in axis["fits"]]
    return element("div", table(["", "as it grows"], rows), class_="texts")


def _points(axis: Row) -> Html:
    shown = {
        what: cost for what, cost in COSTS.items() if any(row[cost[2]] for row in axis["rows"])
    }
    heads = ["", axis["x"], *(f"{what}, {unit}" for what, (unit, _, _) in shown.items())]
    rows = []
    for row in axis["rows"]:
        cells = [
            "" if row[key] is None else f"{row[key] * factor:.4g}"
            for _, factor, key in shown.values()
        ]
        cells += [f"{row['p20 s']:.4g} to {row['p80 s']:.4g}", row["rounds"]]
        rows.append([f"{row['recipe']}, {row['label']}", f"{row['x']:g}", *cells])
    return table([*heads, "seconds, p20 to p80", "rounds"], rows)


def _phases(report: Row) -> Html:
    heads = ["", "ms", "TFLOP", "GB, op by op", "GB, at least", "bound by", "MFU"]
    heads += ["of the copy's speed", "of the roof", ""]
    rows = [
        [
            row["phase"],
            "not measured" if row["p50 s"] is None else format_number(1e3 * row["p50 s"]),
            f"{row['flops'] / 1e12:.3g}",
            f"{row['bytes'] / 1e9:.3g}",
            f"{row['least bytes'] / 1e9:.3g}",
            row["bound"],
            *(_share(row[key]) for key in ("mfu", "share of copy", "share of roof")),
            row["note"],
        ]
        for row in report["phases"]
    ]
    return table(heads, rows, caption="Phases against these ceilings")


def _largest(kernels: list[Row]) -> Html:
    rows = [[row["name"], row["family"], *_taken(row)] for row in kernels]
    return table(["", "family", *TAKEN], rows)


def _taken(row: Row) -> list[object]:
    calls = "" if row["calls"] is None else row["calls"]
    return [f"{1e3 * row['s']:.3g}", _share(row["share"]), calls]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
