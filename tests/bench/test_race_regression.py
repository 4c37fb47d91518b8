"""A race of a step that is slowed down on purpose, against one of the step as it was."""

import os
import subprocess
import sys

import pytest

from bench import ROOT
from bench.race_compare import WORSE, compare_races
from bench.race_results import read_race

OURS = "ppt-lora, eager"
SMALL = (
    *("--model", "mini-sd", "--recipes", "ppt-lora", "--resolution", "32", "--rank", "2"),
    *("--steps", "16", "--sampler-steps", "1", "--class-images", "2"),
    *("--device", "cpu"),
)
# Python runs it before anything else. A read on the host, and far more sleep than other processes
# take away.
SLOWED = """
import time
from fastppt.training import step

update = step.update_parameters

def update_slowly(state):
    update(state)
    state.losses.sum().item()
    time.sleep(0.2)

step.update_parameters = update_slowly
"""


def run(*command):
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_planted_regression_is_seen_in_the_report_of_a_second_race(tmp_path, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    run("bench.race", *SMALL, "--output", str(old))
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(SLOWED)
    # It imports the trainer before Python looks into the working folder.
    paths = [planted, ROOT, ROOT / "kernels"]
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
        run("bench.race", *SMALL, "--output", str(new))
    (before,), (after,) = old.glob("*.json"), new.glob("*.json")

    found = compare_races(read_race(after), read_race(before))
    steps = {change.name: change for change in found.numbers if change.what == "step, ms"}
    assert steps[OURS].verdict == WORSE
    # Other processes slow all entrants down; what was planted, ours alone.
    assert len(steps) >= 3 and max(steps.values(), key=lambda step: step.times) is steps[OURS]

    page = tmp_path / "report.html"
    said = run("bench.report", str(after), "--against", str(before), "--output", str(page))
    assert f"worse than in {before}: {len(found.worse)}" in said
    assert f"  {OURS}: step, ms: " in said
    assert f'<tr class="worse"><th scope="row">{OURS}: step, ms</th>' in page.read_text()
