"""Scaling and roofline on the report's page."""

from pathlib import Path

from bench.race_tables import format_number
from bench.report_html import Html, details, element, join, picture, table
from bench.rows import Row

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
    """
    parts = [describe_settings(report)]
    for axis in report["axes"]:
        parts += [element("h3", f"Cost of {axis['of']} by {axis['x']}"), _fits(axis)]
        if axis.get("picture"):
            parts.append(picture(folder / axis["picture"], f"Cost of {axis['of']} by {axis['x']}"))
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
    profiled = f"A step by families of kernels, {profile['engine']}, {took} ms"
    families = [[row["family"], *_taken(row)] for row in profile["families"] if row["s"] > 0]
    return join(
        describe_settings(report),
        table(["measured in the same run", "at its start", "at its end"], roofs),
        _phases(report),
        table(
            ["", *TAKEN], families, caption=f"A profiled step by families of kernels, {profiled}"
        ),
        details("The largest kernels", _largest(profile["top"])),
    )


def describe_settings(report: Row) -> Html:
    """Return what the numbers were measured with."""
    given = [f"{key.replace('_', ' ')} {value}" for key, value in report["settings"].items()]
    return element("p", ", ".join(text for text in given if not text.endswith(" None")) + ".")


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
        rows.append([f"{row['recipe']}, {row['label']}", f"{row['x']:g}", *cells])
    return table(heads, rows)


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
