"""Whole jobs in this process, on mini models."""

import itertools
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench import race_peer
from bench.race_entrant import run_job
from bench.race_peer import TARGETS, Pictures, load_model, make_step, read_picture
from bench.race_plan import EntrantPlan, RacePlan, list_entrants, make_config
from bench.race_results import PHASES, RaceSettings
from bench.race_watch import Watch
from fastppt.config import ModelConfig
from fastppt.families.loading import load_family
from fastppt.mini import build_mini, draw_demo_photos
from fastppt.training import runners
from fastppt.training.build import build_trainables

SIDE = 32
FAMILIES = {"mini-sd": "sd", "mini-sdxl": "sdxl", "mini-sd3": "sd3"}
SLOW = pytest.mark.slow
MODELS = ["mini-sd", pytest.param("mini-sdxl", marks=SLOW), pytest.param("mini-sd3", marks=SLOW)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Return a maker of the diffusers folders of mini models of random weights."""
    made = {}

    def make(model):
        if model not in made:
            made[model] = tmp_path_factory.mktemp(model)
            build_mini(model, seed=0).save_pretrained(made[model])
        return made[model]

    return make


@pytest.fixture
def make_job(model_folder, photos, tmp_path):
    def make(model, entrant, *, device="cpu", **changes):
        parts = {key: changes.pop(key) for key in ("sampled_images",) if key in changes}
        settings = RaceSettings(
            **{
                "model": model,
                "family": FAMILIES[model],
                "resolution": SIDE,
                "batch_size": 1,
                "precision": "float32",
                "rank": 2,
                "steps": 4,
                "class_images": 5,
                "sampler_steps": 1,
                "guidance_scale": 5.0,
                "num_photos": 5,
                "seed": 0,
                "rounds": 1,
                "threads": 1,
            }
            | changes
        )
        plan = RacePlan(
            settings=settings,
            entrants=[],
            model=str(model_folder(model)),
            device=device,
            photos=photos,
            class_noun="robot",
            work=tmp_path,
            **parts,
        )
        return plan.job(entrant, tmp_path / entrant.slug, tmp_path / "class-images")

    return make


def peer(**fields):
    return EntrantPlan(name="peer", kind="diffusers", **fields)


def ours(recipe, engine="eager", family="sd"):
    return list_entrants([recipe], [engine], family)[-1]


def check_lora_file(file, num_steps):
    """Look whether all adapters have learned: their up-projections began at zero."""
    tensors = load_file(file)
    ups = [tensor for name, tensor in tensors.items() if "lora_B" in name or "lora.up" in name]
    assert len(ups) * 2 == len(tensors)
    moved = sum(bool(up.abs().sum() > 0) for up in ups)
    # The very last text query of sd3 is read by nothing.
    assert moved >= len(ups) - 1


@pytest.mark.parametrize("model", MODELS)
def test_the_peers_job_samples_trains_and_saves(make_job, model):
    job = make_job(model, peer(prior=True))
    found = run_job(job, start_s=2.0)
    assert set(found.phases) == set(PHASES)
    assert all(found.phases[name] > 0 for name in PHASES if name != "other")
    assert found.start_s == 2.0 and found.steps == 4 and found.step_s.p50 > 0
    assert found.memory_kind == "resident" and found.extrapolated == []
    pictures = sorted(job.class_images.iterdir())
    assert [path.suffix for path in pictures] == [".jpg"] * 5
    assert read_picture(pictures[0], SIDE)[0].shape == (3, SIDE, SIDE)
    check_lora_file(job.output / "pytorch_lora_weights.safetensors", 4)


@pytest.mark.parametrize("model", MODELS)
def test_our_job_has_the_same_phases_and_the_same_class_images(make_job, model):
    job = make_job(model, ours("lora-prior", family=FAMILIES[model]))
    found = run_job(job)
    assert set(found.phases) == set(PHASES)
    assert sum(found.phases.values()) > 0 and found.step_s.p50 > 0
    assert len(list(job.class_images.rglob("*.png"))) == 5
    assert list(job.output.glob("*.safetensors"))


def test_class_images_that_are_there_are_not_sampled_again(make_job, monkeypatch):
    loads = []
    monkeypatch.setattr(race_peer, "_load", lambda *args: loads.append(args))
    job = make_job("mini-sd", peer(prior=True))
    draw_demo_photos(job.class_images)
    race_peer.sample_class_images(job, Watch("cpu"))
    assert loads == []


@pytest.mark.slow
def test_without_prior_preservation_there_are_no_class_images(make_job):
    job = make_job("mini-sd", peer(), steps=3)
    found = run_job(job)
    assert "class_images" not in found.phases and not job.class_images.exists()
    assert "class_images" not in run_job(make_job("mini-sd", ours("ppt-lora"), steps=3)).phases


@pytest.mark.parametrize("recipe", ["lora-prior", pytest.param(None, marks=SLOW)])
def test_a_part_of_the_class_images_says_how_long_all_take(make_job, recipe):
    entrant = peer(prior=True, cached=True) if recipe is None else ours(recipe)
    job = make_job("mini-sd", entrant, class_images=400, sampled_images=8)
    found = run_job(job)
    assert set(found.extrapolated) == {"class_images", "encode"}
    pictures = [path for path in job.class_images.rglob("*") if path.suffix in (".png", ".jpg")]
    assert len(pictures) == 8


@pytest.mark.slow
def test_a_slower_step_shows_in_the_steps_and_in_training(make_job, monkeypatch):
    run_step = runners.run_step

    def slow_step(step, number):
        time.sleep(0.5)
        run_step(step, number)

    monkeypatch.setattr(runners, "run_step", slow_step)
    found = run_job(make_job("mini-sd", ours("ppt-lora")))
    assert found.step_s.p20 > 0.5
    assert found.phases["training"] > 1.5


@pytest.mark.parametrize("model", MODELS)
def test_the_peer_trains_the_adapters_that_we_do(make_job, model):
    job = make_job(model, ours("ppt-lora", family=FAMILIES[model]))
    family = load_family(ModelConfig(path=job.model, device="cpu"))
    wanted = {pair.name for pair in build_trainables(make_config(job), family).lora.pairs}
    _, network = load_model(job)
    found = {name for name, module in network.named_modules() if hasattr(module, "lora_B")}
    assert found - wanted <= set(family.unread_projections)
    assert wanted <= found and len(wanted) > len(TARGETS[job.settings.family])


@pytest.mark.parametrize(("precision", "wanted"), [("float16", "float32"), ("bfloat16",) * 2])
def test_the_peers_adapters_are_in_float32_where_the_network_is_in_float16(
    make_job, precision, wanted
):
    _, network = load_model(make_job("mini-sd", peer(), precision=precision))
    trained = {p.dtype for p in network.parameters() if p.requires_grad}
    frozen = {p.dtype for p in network.parameters() if not p.requires_grad}
    assert (trained, frozen) == ({getattr(torch, wanted)}, {getattr(torch, precision)})


def test_a_step_has_photos_and_beside_each_a_class_image(make_job):
    job = make_job("mini-sd", peer(prior=True), batch_size=2)
    draw_demo_photos(job.class_images)
    pipeline, network = load_model(job)
    step = make_step(job, pipeline, network, Watch("cpu"))
    rows = [step._next_photos() for _ in range(10)]
    assert all(len(row) == 4 and max(row[:2]) < 5 <= min(row[2:]) for row in rows)
    # Each picture comes as often as the others.
    assert sorted(itertools.chain(*rows)) == sorted([*range(10)] * 4)
    assert torch.equal(
        step.subject.pixels[7], read_picture(step._pictures._class_files[2], SIDE)[0]
    )


def test_a_class_image_is_read_anew_each_time_and_a_photo_once(make_job, photos, tmp_path):
    job = make_job("mini-sd", peer(prior=True))
    draw_demo_photos(job.class_images)
    pictures = Pictures(job)
    assert len(pictures) == len(pictures.sizes) == 10 and pictures.shape == (10, 3, SIDE, SIDE)
    first = pictures[0]
    assert pictures[0] is first and pictures[5] is not pictures[5]
    assert pictures.sizes[0] == (256, 256, 0, 0)


def test_a_picture_is_scaled_to_its_short_side_and_cut_in_the_middle(tmp_path):
    from PIL import Image

    file = tmp_path / "wide.png"
    Image.linear_gradient("L").resize((120, 40)).convert("RGB").save(file)
    pixels, place = read_picture(file, 20)
    assert pixels.shape == (3, 20, 20) and place == (40, 120, 0, 20)
    assert -1 <= float(pixels.min()) < -0.9 and 0.9 < float(pixels.max()) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_a_job_on_a_gpu_times_its_steps_there_and_counts_torchs_memory(make_job, engine):
    entrants = [peer(prior=True), ours("lora-prior", engine), ours("rare-token", engine)]
    for entrant in entrants:
        job = make_job("mini-sd", entrant, device="cuda", precision="bfloat16", steps=8)
        job = job.model_copy(update={"class_images": Path(job.class_images) / entrant.slug})
        found = run_job(job)
        assert found.memory_kind == "allocated" and found.peak_memory_bytes > 0
        assert 0 < found.step_s.p20 <= found.step_s.p50 <= found.step_s.p80
        # The steps' own time is a part of the phase; stages may capture between them.
        assert found.step_s.p50 * 7 < 3 * (found.phases["training"] + found.phases["first_step"])
