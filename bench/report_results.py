"""Files of results: which bench wrote each, and what lies beside it."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.rows import Row
from bench.tables import latest_by_name

DATED = re.compile(r"(?P<name>.+)-(?P<date>\d{4}-\d{2}-\d{2})")
# Of a folder those are read that are to be kept: not red-*, not quick-*.
KEPT = ("cpu-*.json", "cuda-*.json", "gpu-*.json", "race-gpu-*.json")


@dataclass(frozen=True)
class Result:
    """One file.

    Attributes:
        path: Of the file.
        kind: One of `KINDS`.
        report: What it holds.
    """

    path: Path
    kind: str
    report: Row

    @property
    def pictures(self) -> list[Path]:
        """PNG files of the same bench and day beside it: NAME-DATE.png, NAME-*-DATE.png."""
        dated = DATED.fullmatch(self.path.stem)
        if dated is None:
            patterns = [f"{self.path.stem}.png", f"{self.path.stem}-*.png"]
        else:
            patterns = [f"{dated['name']}{part}-{dated['date']}.png" for part in ("", "-*")]
        return [path for pattern in patterns for path in sorted(self.path.parent.glob(pattern))]


def _has_suite(*suites: str) -> Callable[[Row], bool]:
    return lambda report: any(row.get("suite") in suites for row in report.get("rows", []))


# How the reports are told apart that do not say their kind, asked in this order.
KINDS: dict[str, Callable[[Row], bool]] = {
    "race": lambda report: False,
    "scaling": lambda report: False,
    "roofline": lambda report: False,
    "gpu race": _has_suite("race"),
    "gpu": lambda report: "tests" in report,
    "step": _has_suite("step"),
    "options": _has_suite("options"),
    "anchor": _has_suite("anchor"),
    "alignment": _has_suite("attention alignment", "joint attention", "feature alignment"),
    "adapters": _has_suite("lora"),
    "preservation": lambda report: "claims" in report,
    "prompt following": lambda report: "prompts" in report and "sampler steps" in report,
    "toy2d": lambda report: "anchor minus prior preservation" in report,
}


def read_results(paths: Sequence[Path]) -> list[Result]:
    """Read files, and of folders the latest file of each name.

    Returns:
        Results by kind, in the order of `KINDS`, then of the paths.

    Raises:
        ValueError: a path does not exist, a folder has none, a file is no report of a bench.
    """
    files = [file for path in paths for file in (_list_folder(path) if path.is_dir() else [path])]
    results = [read_result(file) for file in dict.fromkeys(files)]
    return sorted(results, key=lambda result: list(KINDS).index(result.kind))


def read_result(path: Path) -> Result:
    """Read a file.

    Raises:
        ValueError: there is none, it is no JSON, or no report of a bench; names the file.
    """
    try:
        report = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give one of bench/results") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if isinstance(report, dict) and isinstance(report.get("machine"), dict):
        said = report.get("kind")
        for kind, recognises in KINDS.items():
            if said == kind or (said is None and recognises(report)):
                return Result(path, kind, report)
    raise ValueError(f"{path}: no report of a bench (known: {', '.join(KINDS)}); leave it out")


def _list_folder(folder: Path) -> list[Path]:
    latest = [path for pattern in KEPT for path in latest_by_name(folder, pattern)]
    if not latest:
        raise ValueError(f"{folder}: found no {' or '.join(KEPT)}; is the path right?")
    return latest
