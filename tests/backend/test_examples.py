"""The programs of examples/ run as a user runs them, and leave a LoRA that diffusers loads."""

from __future__ import annotations

import re
import runpy
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor

from fastppt.mini import build_mini
from fastppt.outputs.lora_files import DIFFUSERS_FILE

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RunExample = Callable[..., Path]
NAMES = ("bare_loop.py", "accelerate_loop.py", "peft_loop.py")


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunExample:
    """Return what runs an example, and returns the file that it left."""

    def run(name: str, *options: str) -> Path:
        output = tmp_path / f"{len([*tmp_path.iterdir()])}"
        words = [str(EXAMPLES / name), "--output", str(output), *options]
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(words[0], run_name="__main__")
        return output / DIFFUSERS_FILE

    return run


def changes(file: Path) -> Tensor:
    """What the adapters of a file add to all weights, B A, in one vector; alpha is the rank."""
    values = load_file(file)
    downs = [key for key in sorted(values) if "lora_A" in key]
    return torch.cat(
        [(values[key.replace("lora_A", "lora_B")] @ values[key]).flatten() for key in downs]
    )


def test_every_example_is_run_here() -> None:
    assert sorted(path.name for path in EXAMPLES.iterdir() if path.is_file()) == sorted(NAMES)


@pytest.mark.parametrize(
    "path", ["README.md", "docs/backend.md", *(f"examples/{name}" for name in NAMES)]
)
def test_what_an_example_imports_beside_fastppt_is_named(path: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (peft,) = project["optional-dependencies"]["evaluate"]
    assert peft.startswith("peft")
    assert f'pip install . "{peft}"' in (ROOT / path).read_text()


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_marks_what_is_ours(name: str) -> None:
    lines = (EXAMPLES / name).read_text().splitlines()
    assert len(lines) <= 120
    marked = [index for index, line in enumerate(lines) if "# fastppt:" in line]
    ours = r"lora_pairs|AnchoredAdamW\(|attach\(|attached\.|OverfittingIndicator|indicator\.loss"
    for index, line in enumerate(lines):
        if re.search(ours, line) and "import AnchoredAdamW" not in line:
            assert any(0 <= index - mark <= 4 for mark in marked), line


@pytest.mark.parametrize("name", NAMES)
def test_an_example_leaves_a_lora_that_a_pipeline_loads(name: str, run_example: RunExample) -> None:
    file = run_example(name, "--steps", "2", "--batch-size", "1")
    pipe = build_mini("mini-sdxl")
    before = drawn(pipe)
    pipe.load_lora_weights(file.parent)
    assert (drawn(pipe) - before).abs().max() > 1e-3


def drawn(pipe: StableDiffusionXLPipeline) -> Tensor:
    """Latents of a picture."""
    chance = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latent"}
    return pipe("a photo of sks robot", generator=chance, **size).images


@pytest.mark.parametrize(
    "name", ["bare_loop.py", pytest.param("accelerate_loop.py", marks=pytest.mark.slow)]
)
def test_the_anchor_of_an_example_holds(name: str, run_example: RunExample) -> None:
    few = ("--steps", "4", "--batch-size", "1")
    free, held = (
        changes(run_example(name, *few, "--anchor-weight", weight)) for weight in ("0", "100")
    )
    assert held.norm() < 0.7 * free.norm()


@pytest.mark.slow
def test_the_example_of_accelerate_runs_in_mixed_precision(run_example: RunExample) -> None:
    few = ("--steps", "3", "--batch-size", "1")
    plain = changes(run_example("accelerate_loop.py", *few))
    AcceleratorState._reset_state(reset_partial_state=True)
    mixed = changes(run_example("accelerate_loop.py", *few, "--precision", "bf16"))
    assert 0 < (mixed - plain).norm() < 0.5 * plain.norm()


@pytest.mark.slow
def test_the_alignments_of_an_example_pull(run_example: RunExample) -> None:
    few = ("--steps", "2", "--batch-size", "1")
    ends = [
        changes(run_example("peft_loop.py", *few, f"--{name}-weight", "0"))
        for name in ("feature", "attention")
    ]
    ends.append(changes(run_example("peft_loop.py", *few)))
    assert (ends[2] - ends[0]).norm() > 1e-3 * ends[2].norm()
    assert (ends[2] - ends[1]).norm() > 1e-3 * ends[2].norm()
