import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import prompt_following
from fastppt.mini import judge

WEIGHTS = Path(judge.WEIGHTS).parent / "mini-sdxl"


def test_the_command_writes_shares_with_intervals_and_a_sheet(tmp_path, capsys):
    path = tmp_path / "following.json"
    prompt_following.main(["--output", str(path), "--count", "3", "--steps", "1"])
    assert "3 prompts" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["machine"]["torch"] and report["prompts"] == 3 and report["sampler steps"] == 1
    rows = {row["question"]: row for row in report["rows"]}
    assert list(rows) == ["noun", "color", "context", "style", "all three"]
    for row in rows.values():
        for found in (row["drawn"], row["rendered"]):
            assert found["low"] <= found["value"] <= found["high"] and found["count"] == 3
    # The judge is nearly sure of what is rendered.
    assert sum(row["rendered"]["value"] for row in rows.values()) / 5 > 0.5
    assert [rows[name]["wanted"] for name in rows] == [0.9, 0.9, 0.9, None, None]
    with Image.open(path.with_suffix(".png")) as sheet:
        shown = np.asarray(sheet.convert("RGB"))
    # Three pictures with their prompts stand in the first of the rows; the rest is white.
    assert (shown[: len(shown) // 8] < 250).any(axis=2).mean() > 0.1
    assert (shown[len(shown) // 4 :] == 255).all()


@pytest.mark.slow
def test_a_folder_can_stand_in_the_models_place(tmp_path):
    path, model = tmp_path / "a.json", tmp_path / "model"
    arguments = ["--output", str(path), "--count", "1", "--steps", "1", "--model", str(model)]
    with pytest.raises(SystemExit, match="no diffusers folder"):
        prompt_following.main(arguments)
    shutil.copytree(WEIGHTS, model)
    prompt_following.main(arguments)
    assert json.loads(path.read_text())["prompts"] == 1
