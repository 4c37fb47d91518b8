"""Metrics are a line each, whole at every moment, without writing the file a thousand times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastppt.outputs import metrics
from fastppt.outputs.metrics import Curves, MetricsFile


def rows(first: int, last: int) -> list[dict[str, float]]:
    return [{"step": step, "loss": step / 2} for step in range(first, last)]


def test_every_row_is_a_line(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(rows(0, 3))
    file.append(rows(3, 5))
    file.write()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows(0, 5)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_value_that_json_has_no_word_for_is_null(tmp_path: Path, value: float) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append([{"step": 1, "loss": 0.5, "grad_norm": value}])
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    read = json.loads(line, parse_constant=refuse)
    assert read == {"step": 1, "loss": 0.5, "grad_norm": None}


def test_file_is_rewritten_seldom_and_never_lags_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    monkeypatch.setattr(metrics, "write_file", lambda path, text: written.append(text.count("\n")))
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(0, 10_000, 10):
        file.append(rows(step, step + 10))
        assert written[-1] >= 0.9 * (step + 10)
    assert sum(written) < 15 * 10_000


def test_curves_are_read_back_by_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = Curves(tmp_path)
    curves.append(rows(1, 4))
    # What a step did not compute is no point of a curve.
    curves.append([{"step": 4, "loss": float("nan")}])
    curves.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 0.5),
        (2, 1.0),
        (3, 1.5),
    ]


DETAILED = {
    **{"step": 3, "loss": 0.123456789, "skipped": 1, "photos": ["a.jpg"], "timesteps": [812]},
    **{"attention_alignment/up_blocks.0.attn2": 0.123456789, "feature_std/mid_block": 1e-9},
    **{"attention_alignment/mid.attn2": float("nan"), "gamma": 0.5},
    **{"gamma/bin_0": 1 / 3, "gamma/bin_1": float("nan")},
}


def test_numbers_of_bins_and_layers_are_nested_and_short(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append([DETAILED])
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row == {
        **{"step": 3, "loss": 0.123456789, "skipped": 1, "gamma": 0.5},
        **{"photos": ["a.jpg"], "timesteps": [812], "gamma_bins": [0.333333, None]},
        "layers": {
            "attention_alignment": {"up_blocks.0.attn2": 0.123457, "mid.attn2": None},
            "feature_std": {"mid_block": 1e-9},
        },
    }
    assert file.rows() == [row]


def test_curves_are_grouped_by_term(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = Curves(tmp_path)
    curves.append([DETAILED])
    curves.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == [
        *("attention_alignment/up_blocks.0.attn2", "feature_std/mid_block"),
        *("gamma", "gamma/bin_0", "loss", "skipped"),
    ]
