"""A trainer's rounds, as an entrant of a race."""

import datetime
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.peers.jobs import PeerJob
from bench.peers.parse import Log, printed_rate, read_round
from bench.peers.run import Command, end_of, run_trainer
from bench.peers.trainers import Trainer
from bench.race_results import Entrant, Round
from fastppt.errors import UserError

# What of a trainer's environment a reader wants to know.
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "simpletuner")
LIST_VERSIONS = (
    "import importlib.metadata as m, json; "
    "found = {d.name.lower(): d.version for d in m.distributions() if d.name}; "
    f"print(json.dumps({{n: found[n] for n in {PACKAGES} if n in found}}))"
)
OUTPUT = "output.txt"


def time_trainer(name: str, trainer: Trainer, job: PeerJob, pictures: Sequence[Path]) -> Entrant:
    """Run a trainer as many rounds as the race has; returns what they took.

    Args:
        name: Which of `TRAINERS`.
        trainer: That one.
        job: Its ``output`` gets a folder for each round.
        pictures: The photos, which each round has copies of.

    Raises:
        UserError: the trainer failed at the job, or did another one.
    """
    rounds, rates = [], []
    versions = _versions(job.python)
    # It may run long after the race that it joins: when, and how quiet the machine was.
    date, load = datetime.date.today().isoformat(), round(os.getloadavg()[0], 2)
    for number in range(job.settings.rounds):
        log, command, done = _run_round(trainer, job, pictures, number)
        rounds.append(done)
        rates.append(printed_rate(log.bars, trainer.bar))
    known = [rate for rate in rates if rate is not None]
    settings = {
        "trainer": name,
        "commit": _commit(job.checkout),
        "date": date,
        "load": load,
        **versions,
        "command": shlex.join(_from_here(command.words)),
        "it/s, as printed": statistics.median(known) if known else None,
    }
    is_start_known = trainer.has_help or trainer.begins is not None
    notes = [trainer.note, *([] if is_start_known else ["its imports are in `other`"])]
    return Entrant(
        name=job.entrant.name,
        kind=job.entrant.kind,
        engine=job.entrant.engine,
        prior=job.entrant.prior,
        settings=settings,
        note="; ".join(notes),
        rounds=rounds,
    )


def _from_here(words: Sequence[str]) -> list[str]:
    """Return a command as it is typed in the current folder; other paths stay as they are."""
    here = re.escape(f"{Path.cwd()}{os.sep}")
    return [re.sub(rf"(^|=){here}", r"\1", word) for word in words]


def _run_round(
    trainer: Trainer, job: PeerJob, pictures: Sequence[Path], number: int
) -> tuple[Log, Command, Round]:
    folder = job.output / f"round-{number}"
    folders = {name: folder / name for name in ("photos", "class_images")}
    for each in folders.values():
        each.mkdir(parents=True)
    for picture in pictures:
        shutil.copy(picture, folders["photos"])
    job = job.model_copy(update={"output": folder, **folders})
    command, path = trainer.command(job), folder / OUTPUT
    # The launcher's and the script's imports, whatever the rest of the command is.
    start_words = [*command.words, "--help"] if trainer.has_help else None
    log = run_trainer(
        command, path, device=job.device, start_words=start_words, begins=trainer.begins
    )
    printed = path.read_text(errors="replace")
    if trainer.complaint and (found := re.search(trainer.complaint, printed, re.MULTILINE)):
        line = printed[found.start() :].partition("\n")[0]
        raise UserError(f"{path}: the trainer left out a setting: {line}")
    if not (folder / trainer.result).is_file():
        raise UserError(
            f"the trainer ended without an error, and has left no {folder / trainer.result}; all "
            f"that it printed is in {path}, which ends:\n{end_of(path)}"
        )
    try:
        done = read_round(
            log,
            job.settings.steps,
            training=trainer.bar,
            class_images=trainer.class_bar if job.entrant.prior else None,
            counts_from=trainer.counts_from,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return log, command, done


def _commit(checkout: Path) -> str | None:
    """Return the commit of a checkout; None where it is none."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else None


def _versions(python: Path) -> dict[str, str]:
    try:
        done = subprocess.run(
            [str(python), "-c", LIST_VERSIONS], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"--python {python}: is no working interpreter ({error})") from None
    return dict(json.loads(done.stdout))
