"""One entrant of a race, once, in a process of its own: ``python -m bench.race_entrant JOB OUT``.

JOB is a `Job` as JSON. What it took is left in OUT, a `Round` as JSON. The job's clock starts when
all is imported and the GPU is awake; how long that took is noted apart.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.utils import logging
from rich.console import Console

import fastppt.families.sd
import fastppt.families.sd3
import fastppt.families.sdxl  # noqa: F401  (each family is imported on first use)
from bench.race_energy import open_meter
from bench.race_peer import run_peer
from bench.race_plan import Job, make_config
from bench.race_results import Round
from bench.race_watch import Watch, make_round, peak_memory, watched
from fastppt.garbage import without_what_there_is
from fastppt.training.loop import train


def run_job(job: Job, start_s: float = 0.0) -> Round:
    """Do an entrant's job and return what it took.

    Args:
        job: Its output folder is new.
        start_s: What the process took to get here.

    Raises:
        UserError: the job is not possible as it is.
    """
    watch = Watch(job.device, open_meter(job.device))
    noted, began = 0, time.perf_counter()
    if job.entrant.kind == "ours":
        # As the command `fastppt train` does.
        with watched(watch), without_what_there_is():
            result = train(make_config(job), Console(quiet=True))
        noted = max(result.peak_memory.values(), default=0)
    else:
        run_peer(job, watch)
    watch.finish()
    watch.close(time.perf_counter() - began)
    assert watch.num_steps == job.trained_steps, watch.num_steps
    return make_round(job, watch, start_s=start_s, peak=peak_memory(job.device, noted))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read a job, do it, write what it took."""
    parser = argparse.ArgumentParser(prog="python -m bench.race_entrant", description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--started", type=float, default=time.time(), help="seconds since 1970")
    options = parser.parse_args(arguments)
    job = Job.model_validate_json(options.job.read_text())
    torch.set_num_threads(job.settings.threads)
    # Of text encoders without adapters, and of the bars of what is loaded.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if job.device == "cuda":
        torch.zeros((), device=job.device)
        torch.cuda.synchronize()
    found = run_job(job, time.time() - options.started)
    options.out.write_text(found.model_dump_json())


if __name__ == "__main__":
    main()
