"""One training step of the mini models: ours by recipe, diffusers' own, the network alone."""

import pytest

from bench.step import StepWay, time_steps
from bench.step_rows import describe_work
from bench.step_ways import BASE_PASS, MINI_MODELS, NETWORK, PEERS, RECIPES, Work
from fastppt.mini import draw_demo_photos

SECONDS = 6.0
# mini-sdxl at twice its side: latents of 32x32.
WORKS = [*(Work(model) for model in MINI_MODELS), Work("mini-sdxl", resolution=128)]


@pytest.mark.parametrize("work", WORKS, ids=lambda work: f"{work.model}-{work.resolution or 64}")
def test_step_in_rotation(benchmark, device, machine, note_ratio, tmp_path, work):
    draw_demo_photos(tmp_path)
    ways = [StepWay(name) for name in (*RECIPES, *PEERS, NETWORK, BASE_PASS)]
    benchmark.group = "one training step, all ways in rotation"
    options = {"device": device, "seconds": SECONDS}
    rows, refusals = benchmark.pedantic(time_steps, (work, ways, tmp_path), options, rounds=1)
    assert not refusals
    benchmark.extra_info |= {"rows": rows, "machine": machine}
    for row in rows[1:]:
        note_ratio(rows[0], row, describe_work(row))
