"""One cell of the preservation bench: a whole training, and what it made of the model."""

import fcntl
import functools
import hashlib
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from diffusers.utils import logging
from rich.console import Console

from bench.preservation_plan import FIRST_SUBJECT, NOUNS, OBJECTIVES, Method, Plan
from bench.rows import Row
from fastppt.config import RunConfig
from fastppt.config_io import build_config, load_recipe
from fastppt.data.photos import crop_photo, find_photos
from fastppt.data.prompts import subject_words
from fastppt.evaluation.exam import EvaluationSettings
from fastppt.evaluation.identity import Reference, make_reference
from fastppt.evaluation.measures import (
    MEASURES,
    Base,
    base_scores,
    measure_base,
    measure_tuned,
    tuned_scores,
)
from fastppt.mini import build_mini, judge
from fastppt.mini.photos import draw_subject_photos
from fastppt.mini.world import IMAGE_SIZE, random_subject
from fastppt.outputs.files import write_file
from fastppt.outputs.loading import load
from fastppt.outputs.plots import read_metrics
from fastppt.training.loop import train
from fastppt.training.result import RunResult

BASE = "base"
# Of a cell's hash, in the name of its file.
DIGITS = 20
# Points of a curve of the indicator that are kept.
CURVE_POINTS = 20
HALF = 0.5


@dataclass(frozen=True)
class Cell:
    """A method, a subject and a seed; without a method, the base on that subject.

    Attributes:
        method: How the subject is taught.
        subject: Its number, from 0.
        seed: Of the training.
    """

    method: Method | None
    subject: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.noun}, {self.labels()['method']}, seed {self.seed}"

    @property
    def noun(self) -> str:
        return NOUNS[self.subject]

    def labels(self) -> Row:
        """Return what a cell is called, which decides none of its numbers."""
        return {
            "method": BASE if self.method is None else self.method.name,
            "subject": self.subject,
            "noun": self.noun,
            "seed": self.seed,
            "sweep": None if self.method is None else self.method.sweep,
            "anchor weight": None if self.method is None else self.method.anchor_weight,
        }


def list_cells(plan: Plan, methods: Sequence[Method]) -> list[Cell]:
    """Return all cells, a subject after the other, so that each base is asked once a process."""
    cells = []
    for subject in range(plan.subjects):
        cells.append(Cell(None, subject, 0))
        cells += [Cell(method, subject, seed) for seed in range(plan.seeds) for method in methods]
    return cells


def cell_path(cell: Cell, plan: Plan, work: Path) -> Path:
    """Return the file of a cell: named by what its numbers follow from, and not by its method.

    So another plan overwrites nothing, and a weight of the sweep that becomes a method's own is
    not measured again.
    """
    return work / f"{cell.noun}-{cell_key(cell, plan)[:DIGITS]}.json"


def find_cell(cell: Cell, plan: Plan, work: Path) -> Row | None:
    """Return a cell that was measured before; None where it was not, or by other numbers."""
    try:
        row: Row = json.loads(cell_path(cell, plan, work).read_text())
    except FileNotFoundError:
        return None
    return row | cell.labels()


@contextmanager
def hold_cell(path: Path) -> Iterator[bool]:
    """Hold the cell of a file against other processes; say whether it is held, and by none of them.

    The kernel holds the lock: it ends with the process, however that ends.
    """
    lock = path.with_suffix(".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
        # Whoever has opened it meanwhile finds the cell measured.
        if path.exists():
            lock.unlink(missing_ok=True)


def run_cell(cell: Cell, plan: Plan, work: Path) -> Row:
    """Measure a cell and keep it.

    Raises:
        ArithmeticError: a number is not finite.
    """
    torch.set_num_threads(1)
    # Of text encoders without adapters, and of the bars of what is loaded.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began, cpu_began = time.perf_counter(), time.process_time()
    row = cell.labels()
    base, reference = prepare_base(cell.subject, plan.evaluation)
    if cell.method is None:
        scores = base_scores(base, reference)
        # What is measured against the base is nothing here.
        numbers = {name: scores[name].value if name in scores else 0.0 for name in MEASURES}
        row |= {"numbers": numbers, "seconds": {"whole": time.perf_counter() - began}}
    else:
        with tempfile.TemporaryDirectory(prefix="fastppt-preservation-") as folder:
            row |= _train_and_measure(cell, cell.method, plan, Path(folder), base, reference)
    astray = [name for name, value in row["numbers"].items() if not math.isfinite(value)]
    if astray:
        raise ArithmeticError(f"{cell.name}: {', '.join(astray)} not finite; is its rate too high?")
    # Of the last minute: how quiet the machine was.
    row |= {"cpu seconds": time.process_time() - cpu_began, "load": os.getloadavg()[0]}
    write_file(cell_path(cell, plan, work), json.dumps(row) + "\n")
    return row


def _train_and_measure(
    cell: Cell, method: Method, plan: Plan, folder: Path, base: Base, reference: Reference
) -> Row:
    _draw_photos(cell.subject, folder / "photos")
    config = make_config(cell, method, plan, folder)
    began, cpu_began = time.perf_counter(), time.process_time()
    result = train(config, Console(quiet=True))
    trained, cpu_trained = time.perf_counter(), time.process_time()
    pipeline = load(_base_pipeline(), result.folder.root)
    answers = measure_tuned(base, pipeline, subject_words(config.prompts))
    scores = tuned_scores(base, answers, reference)
    class_images = result.seconds.get("class images", 0.0)
    return {
        "numbers": {name: score.value for name, score in scores.items()},
        "seconds": {
            "training": trained - began - class_images,
            "of it steps": result.training_seconds,
            "class images": class_images,
            "CPU of training and class images": cpu_trained - cpu_began,
            "evaluation": time.perf_counter() - trained,
        },
        "class images": sum(len(each.pictures) for each in result.class_images.values()),
        "indicator": read_indicator(result),
    }


def make_config(cell: Cell, method: Method, plan: Plan, folder: Path) -> RunConfig:
    """Return the configuration of a cell's training: the recipe, and the plan over it."""
    _, table = load_recipe(method.recipe, method.family)
    run = folder / "run.toml"
    run.write_text(tomli_w.dumps(table))
    settings = {
        **plan.settings_of(method),
        "model.path": "mini-sdxl",
        "model.device": "cpu",
        "photos.folder": str(folder / "photos"),
        "prompts.class_noun": cell.noun,
        "output": str(folder / "out"),
        "seed": cell.seed,
        "samples.enabled": False,
        "plots": False,
    }
    if "prior_preservation" in table["stage"][0]["objectives"]:
        # Of its own: the time that class images take is a part of the cell.
        settings[f"{OBJECTIVES}.prior_preservation.cache"] = str(folder / "class-images")
    return build_config(file=run, settings=list(settings.items()))


def read_indicator(result: RunResult) -> Row | None:
    """Return the overfitting indicator by timestep bin, least noise first; None without one.

    Its mean over the steps, the part of the steps after which it first passes half (1 where it
    never does), and its course. Before a bin is seen it counts as 0.
    """
    rows = [row["gamma_bins"] for row in read_metrics(result.folder.metrics) if "gamma_bins" in row]
    if not rows:
        return None
    return summarise_indicator([[value or 0.0 for value in bins] for bins in rows])


def summarise_indicator(rows: Sequence[Sequence[float]]) -> Row:
    """Return what `read_indicator` returns of the indicator by step and bin."""
    count = len(rows)
    reached = [
        next((step / count for step, value in enumerate(values) if value >= HALF), 1.0)
        for values in zip(*rows, strict=True)
    ]
    chosen = [round(at * (count - 1) / (CURVE_POINTS - 1)) for at in range(CURVE_POINTS)]
    return {
        "mean": [statistics.fmean(values) for values in zip(*rows, strict=True)],
        "half reached": reached,
        "course": [rows[step] for step in dict.fromkeys(chosen)],
    }


@functools.lru_cache(maxsize=1)
def prepare_base(subject: int, settings: EvaluationSettings) -> tuple[Base, Reference]:
    """Ask the base about a subject, once in a row of cells of that subject."""
    noun, reader = NOUNS[subject], judge.load_judge()
    with tempfile.TemporaryDirectory(prefix="fastppt-preservation-") as folder:
        _draw_photos(subject, Path(folder))
        found = find_photos(Path(folder))
        photos = [crop_photo(photo, (IMAGE_SIZE, IMAGE_SIZE)).pixels for photo in found]
    pipeline = _base_pipeline()
    reference = make_reference(torch.stack(photos), noun, reader, pipeline)
    base = measure_base(pipeline, noun, f"sks {noun}", settings, reader)
    return base, reference


def cell_key(cell: Cell, plan: Plan) -> str:
    """Return a hash of all that a cell's numbers follow from, but for the code."""
    method: Mapping[str, object] = {}
    if cell.method is not None:
        recipe = load_recipe(cell.method.recipe, cell.method.family)[1]
        method = {"recipe": recipe, "settings": plan.settings_of(cell.method)}
    subject = [FIRST_SUBJECT + cell.subject, cell.noun]
    facts = [method, subject, cell.seed, asdict(plan.evaluation), _fingerprint()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@functools.cache
def _fingerprint() -> str:
    """Return a hash of the files of the model and of the judge."""
    files = sorted(path for path in judge.WEIGHTS.parent.rglob("*") if path.is_file())
    return "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)


def _draw_photos(subject: int, folder: Path) -> None:
    shown = random_subject(FIRST_SUBJECT + subject, NOUNS[subject])
    draw_subject_photos(folder, shown, seed=subject)


def _base_pipeline() -> Any:
    pipeline: Any = build_mini("mini-sdxl")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
