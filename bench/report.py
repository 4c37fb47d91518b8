"""All results on one page: ``python -m bench.report RESULTS... --output report.html``.

RESULTS are JSON files of the benches, or a folder of them, of which the latest of each name count.
The page is one file: style, plots and tables are in it, and nothing is loaded from elsewhere. With
``--against OLD.json`` the race among the results is compared with an earlier one, phase by phase,
and what became worse by more than the rounds spread is marked, and printed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.race_compare import Comparison, compare_races
from bench.race_results import read_race
from bench.report_html import Html, code, details, element, join, page, picture, table
from bench.report_race import (
    comparison_section,
    describe_chance,
    describe_change,
    list_warnings,
    race_section,
)
from bench.report_results import Result, read_results
from bench.report_scaling import scaling_section
from bench.report_sections import SECTIONS
from fastppt.outputs.files import write_file

TITLE = "fastppt, measured"
LEAD = (
    "fastppt teaches a pretrained text-to-image model one subject from a few photos, and keeps it "
    "from forgetting the rest. These are measurements of what that takes, beside other ways to do "
    "it. Each section ends with the machine, and with how to measure it again. Every number is of "
    "a file of results, which its section names: "
)
HEADINGS = {
    "race": "The race",
    "scaling": "Scaling",
    "roofline": "Roofline",
    "gpu race": "What is asked of races on a GPU",
    "gpu": "Kernels and steps on a GPU",
    "step": "One training step",
    "options": "What options cost",
    "anchor": "The anchor alone",
    "alignment": "APT's regularisers",
    "adapters": "Adapters beside peft's",
    "preservation": "What methods teach, and what they cost the model",
    "prompt following": "Prompt following of the mini model",
    "toy2d": "A concept learned in the plane",
}
# Where a report does not hold what was typed: its bench, with the options that it has unset.
COMMANDS = {
    "race": "python -m bench.race --output bench/results",
    "scaling": "python -m bench.scaling --output bench/results",
    "roofline": "python -m bench.roofline --output bench/results",
    "gpu race": "python -m bench.gpu --group race --out bench/results",
    "gpu": "python -m bench.gpu --out bench/results",
    "step": "python -m bench.step --out bench/results",
    "options": "python -m bench.options --out bench/results",
    "anchor": "python -m bench.cpu --suite anchor --out bench/results",
    "alignment": "python -m bench.cpu --suite alignment --out bench/results",
    "adapters": "python -m bench.lora_cpu --out bench/results",
    "preservation": "python -m bench.bench_preservation --output bench/results",
    "prompt following": "python -m bench.prompt_following --output FILE.json",
    "toy2d": "python -m bench.toy2d --output bench/results",
}


def write_page(results: Sequence[Result], comparison: Comparison | None, old_name: str) -> str:
    """Return the page of these results, the comparison of the race in front."""
    sections: list[tuple[str, object]] = []
    if comparison is not None:
        heading = "The race, compared with an earlier one"
        sections.append((heading, comparison_section(comparison, old_name)))
    sections += [(name_section(result, results), result_section(result)) for result in results]
    files = ", ".join(result.path.name for result in results)
    lead = element("p", f"{LEAD}{files}.")
    return page(TITLE, lead, sections)


def name_section(result: Result, results: Sequence[Result]) -> str:
    """Return the heading of a result; with its file where there are several of the kind."""
    alone = sum(other.kind == result.kind for other in results) == 1
    return HEADINGS[result.kind] + ("" if alone else f": {result.path.stem}")


def result_section(result: Result) -> Html:
    """Return what a file says, its pictures, its machine, and how to measure it again."""
    pictures = [picture(path, f"{HEADINGS[result.kind]} ({path.name})") for path in result.pictures]
    if result.kind == "race":
        body = race_section(read_race(result.path))
    elif result.kind == "scaling":
        # Its pictures stand where their axes do.
        body, pictures = scaling_section(result.report, result.path.parent), []
    else:
        body = SECTIONS[result.kind](result.report)
    machine = [[key, "" if value is None else value] for key, value in _machine(result).items()]
    return join(
        body,
        *pictures,
        element("h3", "Measured again"),
        *_how_again(result),
        details("Machine and versions", element("div", table(["", ""], machine), class_="texts")),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files, or a folder of them")
    parser.add_argument("--output", type=Path, required=True, help="the HTML file")
    parser.add_argument("--against", type=Path, metavar="OLD", help="JSON of an earlier race")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.results)
        comparison = _compare(results, options.against) if options.against else None
        text = write_page(results, comparison, options.against.name if options.against else "")
        write_file(options.output, text)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if comparison is not None:
        print(f"worse than in {options.against}: {len(comparison.worse) or 'nothing'}")
        for change in comparison.worse:
            print(f"  {describe_change(change)}")
        print("\n".join([describe_chance(comparison), *list_warnings(comparison)]))
    print(f"written: {options.output}")


def _compare(results: Sequence[Result], against: Path) -> Comparison:
    """Compare the one race among the results with an earlier one.

    Raises:
        ValueError: there is not one race, or the two are not of the same work.
    """
    races = [result.path for result in results if result.kind == "race"]
    if len(races) != 1:
        found = "".join(f"\n  {path}" for path in races)
        raise ValueError(
            f"--against: want one race among the results, found {len(races)}; give its file{found}"
        )
    return compare_races(read_race(races[0]), read_race(against))


def _machine(result: Result) -> dict[str, object]:
    return dict(result.report["machine"])


def _how_again(result: Result) -> list[Html]:
    machine, typed = _machine(result), result.report.get("command")
    lines = [f"git checkout {machine['commit']}"] if machine.get("commit") else []
    lines.append(typed or COMMANDS[result.kind])
    name = element("code", result.path.name)
    said = "were" if typed else "are (which options were typed is not in the file)"
    parts = [element("p", "The numbers of ", name, f" {said} measured by:"), code("\n".join(lines))]
    if machine.get("uncommitted changes"):
        parts.append(element("p", "The files had changes beside that commit.", class_="note"))
    return parts


if __name__ == "__main__":
    main()
