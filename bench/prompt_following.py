"""Whether mini-sdxl draws what prompts ask for: ``python -m bench.prompt_following --output F``.

Random prompts of the mini world, the stock diffusers pipeline, and the judge, which was trained on
rendered scenes alone. Beside it stands what the judge reads in as many rendered scenes, so that
its own mistakes are known. A PNG beside the JSON shows the first pictures with their prompts.
"""

import argparse
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench.machine import describe_machine
from bench.rows import Row, write_report
from fastppt.evaluation.intervals import share
from fastppt.mini import build_mini
from fastppt.mini.judge import load_judge
from fastppt.mini.prompt_following import (
    Sampling,
    draw_scenes,
    follow_prompts,
    read_answers,
    render_pictures,
)
from fastppt.mini.world import Scene, caption

# Of these questions, each.
WANTED, WANTED_OF = 0.9, ("noun", "color", "context")
SHEET_SIDE, SHEET_INCHES, LINE_LETTERS = 8, 1.5, 24


def measure(
    pipeline: Any, scenes: Sequence[Scene], sampling: Sampling, seed: int
) -> tuple[Row, Tensor]:
    """Return the shares of prompts that are followed, and the pictures [N, 3, 64, 64]."""
    judge = load_judge()
    began, cpu_began = time.perf_counter(), time.process_time()
    drawn, pictures = follow_prompts(pipeline, judge, scenes, sampling, seed)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    rendered = read_answers(judge, render_pictures(scenes), scenes)
    rows = [
        {"question": question, "wanted": WANTED if question in WANTED_OF else None}
        | {"drawn": asdict(share(drawn[question])), "rendered": asdict(share(rendered[question]))}
        for question in drawn
    ]
    report: Row = {
        "prompts": len(scenes),
        "seed": seed,
        "sampler steps": sampling.steps,
        "guidance scale": sampling.guidance_scale,
        "seconds": seconds,
        "cpu seconds": cpu_seconds,
        "rows": rows,
    }
    return report, pictures


def draw_sheet(pictures: Tensor, prompts: Sequence[str], path: Path) -> None:
    """Draw the first 64 pictures with their prompts."""
    size = SHEET_SIDE * SHEET_INCHES
    figure = Figure(figsize=(size, 1.25 * size), dpi=100, layout="constrained")
    all_axes = figure.subplots(SHEET_SIDE, SHEET_SIDE).flatten()
    for axes in all_axes:
        axes.axis("off")
    for axes, picture, prompt in zip(all_axes, pictures, prompts, strict=False):
        axes.imshow((picture.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy())
        axes.set_title(textwrap.fill(prompt, LINE_LETTERS), fontsize=7)
    figure.savefig(path)


def print_report(report: Row) -> None:
    print(f"{report['prompts']} prompts, {report['seconds']:.0f} s for the pictures")
    for row in report["rows"]:
        wanted = "" if row["wanted"] is None else f"  wanted {row['wanted']}"
        cells = [f"{name} {_in_words(row[name])}" for name in ("drawn", "rendered")]
        print(f"  {row['question']:<10} {'  '.join(cells)}{wanted}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.prompt_following", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the JSON; a PNG lies beside it")
    parser.add_argument("--model", type=Path, help="diffusers folder (default: mini-sdxl)")
    parser.add_argument("--count", type=int, default=512, help="prompts")
    parser.add_argument("--steps", type=int, default=Sampling.steps, help="of the sampler")
    parser.add_argument("--guidance-scale", type=float, default=Sampling.guidance_scale)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    # More OpenMP threads than free cores make this many times slower.
    torch.set_num_threads(1)
    machine, scenes = describe_machine(), draw_scenes(options.count, options.seed)
    sampling = Sampling(options.steps, options.guidance_scale)
    report, pictures = measure(_load(options.model), scenes, sampling, options.seed)
    print_report(report)
    write_report(options.output, {"machine": machine, **report})
    sheet = options.output.with_suffix(".png")
    draw_sheet(pictures, [caption(scene) for scene in scenes], sheet)
    print(f"written: {options.output}\nwritten: {sheet}")


def _in_words(found: Row) -> str:
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def _load(folder: Path | None) -> Any:
    if folder is None:
        pipeline: Any = build_mini("mini-sdxl")
    else:
        from diffusers import StableDiffusionXLPipeline

        if not (folder / "model_index.json").is_file():
            raise SystemExit(f"--model {folder}: is no diffusers folder")
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


if __name__ == "__main__":
    main()
