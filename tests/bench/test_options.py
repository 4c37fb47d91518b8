import json

import pytest

from bench import options
from bench.problems import DisagreementError


def test_every_option_is_one_that_a_run_has(tmp_path, monkeypatch):
    runs = []

    def build(recipe, settings):
        runs.append(build_config(recipe, settings=settings))
        return runs[-1]

    build_config = options.build_config
    monkeypatch.setattr(options, "build_config", build)
    monkeypatch.setattr(options, "train", lambda config, console, overwrite: None)
    for changes in options.OPTIONS.values():
        options._run("mini-sdxl", 64, tmp_path, changes)
    plain, *others = runs
    assert all(run != plain for run in others)
    for run in runs:
        (stage,) = run.stage
        assert options.TIMED_STEPS % stage.base_every == 0
        assert options.TIMED_STEPS % max(1, run.photos.refresh_every) == 0
        # As the rows say, whatever the recipe has for the model.
        assert stage.trainables.lora.rank == options.RANK


@pytest.mark.slow
def test_whole_runs_are_timed_and_written_with_their_machine(tmp_path, monkeypatch):
    chosen = (options.PLAIN, options.CHECKPOINTED)
    monkeypatch.setattr(options, "ROUNDS", 2)
    monkeypatch.setattr(options, "TIMED_STEPS", 2)
    monkeypatch.setattr(options, "OPTIONS", {name: options.OPTIONS[name] for name in chosen})
    options.main(["--resolution", "64", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("cpu-options-") or path.name.startswith("cuda-options-")
    report = json.loads(path.read_text())
    assert report["machine"]["torch"]
    assert [row["way"] for row in report["rows"]] == list(chosen)
    assert report["rows"][0]["times ours"] == 1.0
    assert all(row["p50 ms"] > 0 and row["resolution"] == 64 for row in report["rows"])


def test_an_option_that_changes_the_losses_is_not_reported():
    options.check_losses([1.0, 2.0], [1.0, 2.0])
    for found in ([1.0, 2.001], [1.0, float("nan")]):
        with pytest.raises(DisagreementError, match="so nothing is reported"):
            options.check_losses(found, [1.0, 2.0])
