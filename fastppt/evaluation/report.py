"""What an evaluation leaves: a JSON file, a table, and a grid of pictures."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fastppt import __version__
from fastppt.evaluation.exam import CLASS, OTHER, SUBJECT
from fastppt.evaluation.intervals import Score
from fastppt.evaluation.measures import MEASURES, Measure
from fastppt.evaluation.runs import Evaluation, RunScores
from fastppt.families.names import WORLD_MODEL
from fastppt.outputs.files import write_file
from fastppt.outputs.folder import RunFolder
from fastppt.outputs.samples import png_bytes

FORMAT = "fastppt-evaluation-1"
"""What the JSON file holds; it changes with the meaning of any key."""

GRID_ROWS = {SUBJECT: 4, CLASS: 4, OTHER: 4}
"""Pictures of each set that the grid shows."""

CELL, MARGIN, FONT_SIZE, LABEL_WIDTH = 128, 6, 13, 190
"""Pixels. Pictures are enlarged to twice their side."""


def write_reports(evaluation: Evaluation, output: Path | None) -> list[Path]:
    """Write one report of all runs into a folder, or of each run into its own; returns the paths.

    Raises:
        UserError: a file cannot be written.
    """
    if output is not None:
        return write_report(evaluation, output)
    parts = [(replace(evaluation, runs=[run]), run.folder) for run in evaluation.runs]
    return [path for part, folder in parts for path in write_report(part, folder)]


def write_report(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write the JSON file and the grid into a folder; returns their paths.

    Raises:
        UserError: one cannot be written.
    """
    place = RunFolder(folder)
    write_file(place.evaluation, json.dumps(as_json(evaluation), indent=2) + "\n")
    write_file(place.evaluation_grid, png_bytes(draw_grid(evaluation)))
    return [place.evaluation, place.evaluation_grid]


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation as what a JSON file can hold."""
    reference = evaluation.reference
    settings = evaluation.base.exam.settings
    return {
        "format": FORMAT,
        "fastppt": __version__,
        "model": WORLD_MODEL,
        "class_noun": evaluation.base.exam.noun,
        "settings": asdict(settings),
        "photos": len(reference.photos),
        "drift_threshold": {"cosine": reference.threshold, "error_rate": reference.error_rate},
        "measures": {name: asdict(measure) for name, measure in MEASURES.items()},
        "base": {"words": evaluation.base_words, "scores": _plain(evaluation.base_scores)},
        "runs": [
            {
                "name": name,
                "folder": str(run.folder),
                "recipe": run.config.method,
                "steps": [stage.steps for stage in run.config.stage],
                "seed": run.config.seed,
                "scores": _plain(run.scores),
            }
            for name, run in zip(column_names(evaluation.runs), evaluation.runs, strict=True)
        ],
    }


def flat(scores: Mapping[str, Score]) -> dict[str, float]:
    """Return the values alone."""
    return {name: score.value for name, score in scores.items()}


def make_table(evaluation: Evaluation) -> Table:
    """Make a table: a row a measure, a column for the base and for each run."""
    count = evaluation.base.exam.settings.samples
    threshold = evaluation.reference.threshold
    table = Table(
        caption=(
            f"{count} pictures a set of prompts, of the same seeds; ± the farther end of a 95 % "
            "interval over pictures, not over trainings; "
            "↑ higher is better, ↓ lower. Distances, precision, recall and differences are to the "
            "base; its own column has those of two sets of its pictures, of other seeds: a scale, "
            "for a run that has not moved has 0 and 100 %. "
            f"A picture shows the subject from a likeness of {threshold:.2f} on (wrong for "
            f"{evaluation.reference.error_rate:.1%} of rendered scenes)."
        ),
        caption_justify="left",
    )
    table.add_column("")
    for name in ("base", *column_names(evaluation.runs)):
        table.add_column(Text(name), justify="right")
    columns = [evaluation.base_scores, *(run.scores for run in evaluation.runs)]
    group = ""
    for name, measure in MEASURES.items():
        if measure.group != group:
            group = measure.group
            table.add_section()
            table.add_row(Text(group, style="bold"))
        cells = [_cell(measure, column.get(name)) for column in columns]
        arrow = "↑" if measure.better == "higher" else "↓"
        table.add_row(f"  {measure.text} {arrow}", *cells)
    return table


def draw_grid(evaluation: Evaluation) -> Image.Image:
    """Draw pictures of base and runs side by side, of the same prompts and seeds.

    Each row has its prompt on the left. The base is asked for the subject as `base_words` says.
    """
    models = [evaluation.base.answers, *(run.answers for run in evaluation.runs)]
    rows = [
        (name, index) for name, count in GRID_ROWS.items() for index in _some(models, name, count)
    ]
    width = LABEL_WIDTH + len(models) * (CELL + MARGIN)
    head = FONT_SIZE + 2 * MARGIN
    grid = Image.new("RGB", (width, head + len(rows) * (CELL + MARGIN)), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(size=FONT_SIZE)
    for column, name in enumerate(("base", *column_names(evaluation.runs))):
        left = LABEL_WIDTH + column * (CELL + MARGIN)
        # The end: there the paths, and often the names, of runs differ.
        pen.text((left, MARGIN), name[-CELL // 8 :], fill="black", font=font)
    for row, (name, index) in enumerate(rows):
        top = head + row * (CELL + MARGIN)
        # As the runs are asked.
        prompt = models[-1].asked[name][index].prompt
        lines = textwrap.wrap(prompt, width=LABEL_WIDTH // 8)
        pen.text((MARGIN, top + MARGIN), "\n".join(lines), fill="black", font=font)
        for column, answers in enumerate(models):
            picture = _image(answers.pictures[name][index])
            grid.paste(picture, (LABEL_WIDTH + column * (CELL + MARGIN), top))
    return grid


def column_names(runs: Sequence[RunScores]) -> list[str]:
    """Return what to call runs: the names of their folders, or their paths where names repeat."""
    names = [run.folder.resolve().name for run in runs]
    if len(set(names)) < len(names):
        return [str(run.folder) for run in runs]
    return names


def _some(models: Sequence[Any], name: str, count: int) -> Iterable[int]:
    return range(min(count, len(models[0].pictures[name])))


def _image(picture: Tensor) -> Image.Image:
    pixels = ((picture + 1) * 127.5).round().to("cpu").permute(1, 2, 0).numpy().astype(np.uint8)
    return Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.NEAREST)


def _plain(scores: Mapping[str, Score]) -> dict[str, dict[str, float | int | None]]:
    return {name: asdict(score) for name, score in scores.items()}


def _cell(measure: Measure, score: Score | None) -> str:
    if score is None:
        return ""
    factor, digits = (100, ".0f") if measure.percent else (1, ".3g")
    text = f"{factor * score.value:{digits}}"
    if score.low is not None and score.high is not None:
        # An interval need not be as long on both sides: that of 0 of 8 ends at 0 and at 32 %.
        reach = factor * max(score.high - score.value, score.value - score.low)
        text += f" ± {reach:{'.0f' if measure.percent else '.1g'}}"
    return f"{text} %" if measure.percent else text
