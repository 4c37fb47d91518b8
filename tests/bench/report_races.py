"""Races and reports of other benches that nobody ran, for tests of what is made of them."""

from bench.race_ratios import make_report
from bench.race_results import Entrant, RaceSettings, Round, StepTimes

MACHINE = {
    "device": "cpu",
    "cpu": "A CPU",
    "gpu": None,
    "threads": 1,
    "python": "3.11.7",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "diffusers": "0.42.1",
    "commit": "abcdef0",
    "uncommitted changes": False,
    "date": "2030-01-02",
}
SETTINGS = RaceSettings(
    model="mini-sdxl",
    family="sdxl",
    resolution=64,
    batch_size=1,
    precision="float32",
    rank=4,
    steps=200,
    class_images=100,
    sampler_steps=50,
    guidance_scale=7.5,
    num_photos=5,
    seed=0,
    rounds=3,
    threads=1,
)
PEER, LORA_PRIOR, PPT_EAGER, PPT_GRAPH = (
    "diffusers-style, prior preservation",
    "lora-prior, eager",
    "ppt-lora, eager",
    "ppt-lora, graph",
)
# Of the rounds, how long each takes relative to the middle one.
ROUNDS = (0.98, 1.0, 1.03)


def make_entrant(name, *, step, class_images=None, kind="ours", rounds=ROUNDS, **fields):
    """An entrant that loads in 2 s, and whose 200 steps take so many seconds each."""
    times = [
        Round(
            start_s=3.0,
            phases={"load": 2.0 * each, "training": 199 * step * each, "save": 0.1 * each}
            | ({} if class_images is None else {"class_images": class_images * each}),
            steps=200,
            step_s=StepTimes(p20=0.95 * step * each, p50=step * each, p80=1.1 * step * each),
            peak_memory_bytes=round(5e8),
            memory_kind="resident",
        )
        for each in rounds
    ]
    given = {"engine": "eager", "prior": class_images is not None} | fields
    return Entrant(name=name, kind=kind, rounds=times, **given)


def make_entrants(*, ppt_step=0.05, pace=1.0, rounds=ROUNDS):
    """Four entrants; on a machine of that pace."""
    of = {"rounds": [pace * each for each in rounds]}
    return [
        make_entrant(PEER, step=0.12, class_images=200.0, kind="diffusers", **of),
        make_entrant(LORA_PRIOR, step=0.09, class_images=150.0, recipe="lora-prior", **of),
        make_entrant(PPT_EAGER, step=ppt_step, recipe="ppt-lora", **of),
        make_entrant(PPT_GRAPH, step=0.02, recipe="ppt-lora", engine="graph", **of),
    ]


def make_race(entrants=None, *, machine=MACHINE, command="", **changes):
    settings = SETTINGS.model_copy(update=changes)
    return make_report(machine, settings, entrants or make_entrants(), command)
