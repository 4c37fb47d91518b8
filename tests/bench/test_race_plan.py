from pathlib import Path

import pytest

from bench.race_plan import (
    ALL_RECIPES,
    CACHED_PEER,
    PEER,
    PRIOR_PEER,
    RacePlan,
    check_part,
    list_entrants,
    make_config,
    recipes_for,
    split_steps,
)
from bench.race_results import RaceSettings
from fastppt.errors import UserError
from fastppt.training.class_images import default_cache

SETTINGS = RaceSettings(
    model="mini-sd",
    family="sd",
    resolution=32,
    batch_size=2,
    precision="float32",
    rank=3,
    steps=50,
    class_images=12,
    sampler_steps=2,
    guidance_scale=4.0,
    num_photos=5,
    seed=7,
    rounds=2,
    threads=1,
)


def make_job(recipe, family="sd", **fields):
    settings = SETTINGS.model_copy(update={"model": f"mini-{family}", "family": family})
    plan = RacePlan(
        settings=settings,
        entrants=[],
        model=f"mini-{family}",
        device="cpu",
        photos=Path("/photos"),
        class_noun="robot",
        work=Path("/work"),
        **fields,
    )
    entrants = list_entrants([recipe], ["eager"], family)
    return plan.job(entrants[-1], Path("/work/out"), Path("/work/class-images"))


def test_the_peers_run_and_each_recipe_under_each_engine():
    found = list_entrants(["lora-prior", "ppt-lora"], ["eager", "graph"], "sdxl")
    assert [(each.name, each.prior) for each in found] == [
        (PRIOR_PEER, True),
        (CACHED_PEER, True),
        (PEER, False),
        ("lora-prior, eager", True),
        ("lora-prior, graph", True),
        ("ppt-lora, eager", False),
        ("ppt-lora, graph", False),
    ]


def test_only_what_samples_in_the_same_way_shares_class_images():
    recipes = ["lora-prior", "dreambooth-prior"]
    engines = ["eager", "compile", "graph", "graph+compile"]
    found = {each.name: each.samples_like for each in list_entrants(recipes, engines, "sd")}
    assert found[PRIOR_PEER] == found[CACHED_PEER]
    assert found["lora-prior, eager"] == found["lora-prior, compile"]
    assert found["lora-prior, graph"] == found["lora-prior, graph+compile"]
    names = (PRIOR_PEER, "lora-prior, eager", "lora-prior, graph", "dreambooth-prior, eager")
    assert len({found[name] for name in names}) == 4


@pytest.mark.parametrize("recipe", ["custom-diffusion-prior", "nothing"])
def test_a_recipe_that_is_not_for_the_family_is_refused(recipe):
    with pytest.raises(UserError, match=rf"--recipes {recipe}: is no recipe for sdxl; there are"):
        list_entrants([recipe], ["eager"], "sdxl")


def test_every_recipe_of_a_family_gets_the_settings_of_the_race():
    for family in ("sd", "sdxl", "sd3"):
        for recipe in recipes_for(family):
            config = make_config(make_job(recipe, family))
            assert sum(stage.steps for stage in config.stage) == SETTINGS.steps
            assert (config.seed, config.engine, config.photos.resolution) == (7, "eager", 32)
            assert config.model.precision == "fp32"
            assert not config.samples.enabled and not config.plots
            for stage in config.stage:
                assert (stage.batch_size, stage.gradient_accumulation) == (2, 1)
                assert stage.checkpoint_every == 0
                moving = stage.trainables
                for table in (moving.lora, moving.text_encoder_lora):
                    assert table is None or table.rank == 3
    assert {*recipes_for("sd"), *recipes_for("sdxl"), *recipes_for("sd3")} == {*ALL_RECIPES}


def test_class_images_are_those_of_the_race_and_in_none_of_the_users_folders():
    (stage,) = make_config(make_job("lora-prior", sampled_images=8)).stage
    prior = stage.objectives.prior_preservation
    assert (prior.num_images, prior.steps, prior.guidance_scale, prior.batch_size) == (8, 2, 4.0, 4)
    assert prior.cache == Path("/work/class-images") != default_cache()


def test_a_part_of_the_steps_is_what_is_trained():
    assert make_config(make_job("ppt-lora", trained_steps=9)).stage[0].steps == 9


@pytest.mark.parametrize(
    ("total", "parts", "wanted"),
    [(200, [100, 400], [40, 160]), (7, [100, 400], [1, 6]), (3, [1, 1, 500], [1, 1, 1])],
)
def test_stages_share_the_steps_in_the_recipes_proportions(total, parts, wanted):
    assert split_steps(total, parts) == wanted


def test_fewer_steps_than_stages_are_refused():
    with pytest.raises(UserError, match="--steps 1: a recipe of 2 stages"):
        split_steps(1, [100, 400])


@pytest.mark.parametrize("part", [7, 13])
def test_a_part_too_small_or_larger_than_the_whole_is_refused(part):
    check_part("sampled-images", None, 4, 8)
    check_part("sampled-images", 12, 12, 8)
    with pytest.raises(UserError, match=rf"--sampled-images must be 8 to 12, got {part}"):
        check_part("sampled-images", part, 12, 8)


@pytest.mark.parametrize(("part", "whole"), [(9, 12), (8, 18)])
def test_only_whole_batches_are_extrapolated(part, whole):
    check_part("sampled-images", 8, 12, 8, multiple=4)
    check_part("sampled-images", 18, 18, 8, multiple=4)
    with pytest.raises(UserError, match=rf"--sampled-images {part} of {whole}: must both be mult"):
        check_part("sampled-images", part, whole, 8, multiple=4)
