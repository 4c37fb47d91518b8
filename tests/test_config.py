"""Configurations: laid over each other in order, refused in words, printed and taken back."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from fastppt import config as config_module
from fastppt import config_io, stage_config, trainables_config
from fastppt.config import RunConfig
from fastppt.config_io import (
    RECIPES,
    build_config,
    check_complete,
    check_recipe_fits,
    load_recipe,
    parse_setting,
    recipe_text,
    render_toml,
)
from fastppt.errors import UserError
from fastppt.families.names import FAMILY_NAMES, MINI_MODELS
from fastppt.stage_config import AttentionAlignmentConfig, StageConfig
from fastppt.trainables_config import NETWORK_TRAINABLES


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("recipe", RECIPES)
def test_printed_configuration_is_taken_back_unchanged(recipe: str, tmp_path: Path) -> None:
    settings = [
        ("model.path", "mini-sdxl"),
        ("output", 'with "quotes" and \\'),
        ("prompts.contexts", ["ein Bild von {subject}", "☃ {subject}"]),
        ("stage.0.optimizer.epsilon", 1e-12),
    ]
    config = build_config(recipe, settings=settings)
    again = build_config(file=write(tmp_path / "run.toml", render_toml(config)))
    assert again == config


def test_printed_configuration_has_every_key_with_its_sentence() -> None:
    text = render_toml(build_config("ppt-lora"))
    for section in (RunConfig, *map(type, [build_config("ppt-lora").stage[0]])):
        for name, field in section.model_fields.items():
            if field.description:
                assert f"# {field.description.splitlines()[0]}" in text, name
    assert tomllib.loads(text)["stage"][0]["objectives"]["anchor"]["form"] == "effective"


def test_printed_configuration_offers_the_tables_that_the_run_does_without(tmp_path: Path) -> None:
    config = build_config("lora")
    assert config.stage[0].objectives.attention_alignment is None
    lines = render_toml(config).splitlines()
    start = lines.index("# [stage.objectives.attention_alignment]")
    # The whole sentence stands above it.
    assert lines[start - 1].endswith("equation 6).")
    end = start + lines[start:].index("")
    wanted = [line.removeprefix("# ") for line in lines[start:end]]
    file = write(tmp_path / "run.toml", "\n".join(lines[:start] + wanted))
    objectives = build_config(file=file).stage[0].objectives
    assert objectives.attention_alignment == AttentionAlignmentConfig()


@pytest.mark.parametrize("name", NETWORK_TRAINABLES)
def test_printed_configuration_has_a_line_for_each_of_what_else_could_move_the_network(
    name: str, tmp_path: Path
) -> None:
    text = render_toml(build_config("textual-inversion"))
    assert text.count(f"[stage.trainables.{name}]") == 1
    (line,) = [line for line in text.splitlines() if f"[stage.trainables.{name}]" in line]
    # Uncommented, it has its defaults.
    header = line.removeprefix("# ").partition("]")[0] + "]"
    file = write(tmp_path / "run.toml", text.replace(line, header))
    moving = build_config(file=file).stage[0].trainables
    assert list(moving.given) == [name, "tokens"]
    # Where one of them moves the network, that one stands there whole.
    own = render_toml(build_config(file=file))
    assert header in own.splitlines() and line not in own


def test_a_recipe_that_differs_by_family_is_that_of_the_model(tmp_path: Path) -> None:
    def second(**settings: object) -> list[str]:
        chosen = [(key.replace("__", "."), value) for key, value in settings.items()]
        return list(build_config("rare-token", settings=chosen).stage[1].trainables.given)

    assert second() == second(model__path="mini-sd") == ["full"]
    assert second(model__path="mini-sdxl") == second(model__path="mini-sd3") == ["lora"]
    whole = build_config("rare-token", settings=[parse_setting('model={path="mini-sd3"}')])
    assert list(whole.stage[1].trainables.given) == ["lora"]
    # A setting reaches the tables of that family.
    settings = [("model.path", "mini-sd3"), ("stage.1.trainables.lora.rank", 5)]
    config = build_config("rare-token", settings=settings)
    assert config.stage[1].trainables.lora.rank == 5
    # What a run has written says all itself, whatever the model.
    file = write(tmp_path / "run.toml", render_toml(config))
    other = build_config(file=file, settings=[("model.path", "no/such-model")])
    assert other.stage == config.stage
    # The model of a file counts as that of a setting.
    file = write(tmp_path / "a.toml", 'recipe = "rare-token"\n[model]\npath = "mini-sdxl"\n')
    assert list(build_config(file=file).stage[1].trainables.given) == ["lora"]


def test_a_model_that_is_none_is_refused_where_the_recipe_asks_for_its_family() -> None:
    with pytest.raises(UserError, match="model nowhere: is no file"):
        build_config("dreambooth", settings=[("model.path", "nowhere")])
    with pytest.raises(UserError, match=r"model\.path must be text in quotes"):
        build_config("dreambooth", settings=[("model.path", 3)])


def test_variants_are_of_the_recipe_s_own_families_and_differ() -> None:
    for name in RECIPES:
        recipe, plain = load_recipe(name)
        variants = tomllib.loads(recipe_text(name)).get("variant", [])
        named = [family for variant in variants for family in variant.get("families", [])]
        # The first family has none, so that the recipe reads as it is where no model is given.
        assert set(named) < set(recipe.families) and len(set(named)) == len(named)
        assert recipe.families[0] not in named
        for family in recipe.families:
            _, table = load_recipe(name, family)
            assert (table != plain) == (family in named), (name, family)
            RunConfig.model_validate(table)


def test_an_embedded_model_has_settings_of_its_own() -> None:
    def stage(recipe: str, model: str) -> StageConfig:
        return build_config(recipe, settings=[("model.path", model)]).stage[0]

    held, other = stage("ppt-lora", "mini-sdxl"), stage("ppt-lora", "some/model")
    assert held.objectives.anchor.weight == 3e-3 and other.objectives.anchor.weight == 1e-3
    assert held.objectives.anchor.form == other.objectives.anchor.form
    plain = stage("lora", "mini-sdxl")
    assert held.trainables == plain.trainables != other.trainables
    assert other == build_config("ppt-lora").stage[0] == stage("ppt-lora", "mini-sd")
    # They lie over those of its family, and under the user's.
    word = stage("textual-inversion", "mini-sdxl")
    assert (word.gradient_accumulation, word.optimizer.max_grad_norm) == (1, 0.0)
    given = [("model.path", "mini-sdxl"), ("stage.0.trainables.lora.rank", 5)]
    assert build_config("ppt-lora", settings=given).stage[0].trainables.lora.rank == 5


def test_settings_of_embedded_models_are_of_models_that_there_are() -> None:
    for name in RECIPES:
        table = tomllib.loads(recipe_text(name))
        for variant in table.get("variant", []):
            for model in variant.get("models", []):
                assert MINI_MODELS[model] in table["families"], name
                assert variant.keys() == {"models", "settings"}
                _, own = load_recipe(name, MINI_MODELS[model], model)
                assert own != load_recipe(name, MINI_MODELS[model])[1]
                RunConfig.model_validate(own)


def test_every_setting_has_a_sentence() -> None:
    modules = (config_module, stage_config, trainables_config)
    sections = [section for module in modules for section in vars(module).values()]
    for section in sections:
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            continue
        for name, field in section.model_fields.items():
            is_table = "Config" in str(field.annotation)
            assert is_table or field.description, f"{section.__name__}.{name}"


def test_settings_win_over_file_and_file_over_recipe(tmp_path: Path) -> None:
    file = write(tmp_path / "run.toml", 'recipe = "lora"\nseed = 3\nlog_every = 7\n')
    config = build_config(file=file, settings=[("seed", 4), ("seed", 5)])
    assert (config.recipe, config.seed, config.log_every) == ("lora", 5, 7)
    assert config.stage[0].objectives.anchor is None


def test_stages_of_a_file_replace_those_of_its_recipe(tmp_path: Path) -> None:
    text = """
    recipe = "ppt-lora"
    [[stage]]
    steps = 9
    [stage.trainables.lora]
    [stage.objectives.denoising]
    """
    config = build_config(file=write(tmp_path / "run.toml", text))
    assert config.stage[0].objectives.anchor is None
    # Another recipe by flag is a request for that recipe's stages.
    assert build_config("ppt-lora", write(tmp_path / "b.toml", text)) == config
    other = text.replace("ppt-lora", "lora")
    assert build_config("ppt-lora", write(tmp_path / "c.toml", other)).stage[0].objectives.anchor


def test_set_reaches_a_key_that_the_recipe_leaves_out() -> None:
    key, value = parse_setting("stage.0.objectives.anchor.weight=0.1")
    assert build_config("lora", settings=[(key, value)]).stage[0].objectives.anchor.weight == 0.1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a = 0.5", 0.5),
        ("a=true", True),
        ("a=dog", "dog"),
        ('a="x=y"', "x=y"),
        ("a=['p', 'q']", ["p", "q"]),
    ],
)
def test_set_reads_toml_values_and_bare_words(text: str, value: object) -> None:
    assert parse_setting(text) == ("a", value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stage.0.steps", 0, "stage.0.steps must be >= 1, got 0"),
        ("stage.0.objectives.anchor.weight", -0.3, "anchor.weight must be >= 0, got -0.3"),
        ("stage.0.objectivs.x", 1, "unknown key stage.0.objectivs; did you mean 'objectives'?"),
        ("stage.0.trainables.lora.rnk", 1, "lora.rnk; did you mean 'rank'?"),
        ("photos.foldr", "x", "unknown key photos.foldr; did you mean 'folder'?"),
        ("stage.1.steps", 5, "there is no such stage (stages count from 0; here: 0)"),
        ("stage.².steps", 5, "there is no such stage"),
        ("stage.0", 5, "names a whole table"),
        ("seed", True, "seed must be a whole number, got True"),
        ("stage.0.base_every", "two", "stage.0.base_every must be a whole number, got 'two'"),
        ("gradient_checkpointing", "maybe", "must be true or false, got 'maybe'"),
        ("photos.max_rotation", "far", "photos.max_rotation must be a number, got 'far'"),
        ("photos.max_zoom_out", 11.0, "photos.max_zoom_out must be <= 10, got 11"),
        ("stage.0.objectives.feature_alignment.layers", "up", 'layers must be a list, such as ["'),
        ("stage.0.objectives.attention_alignment.layers", [], "must be a list that is not empty"),
        ("prompts.token", "", "prompts.token must be text that is not empty, got ''"),
        ("prompts.token", 5, "prompts.token must be text in quotes, got 5"),
        ("photos.folder", 5, "photos.folder must be text in quotes, got 5"),
        ("samples.seed", 2**70, "samples.seed"),
        ("stage.0.trainables.lora.targets", "down", 'targets: must be "up" or a list'),
        ("stage.0.trainables.lora.targets", [], "or a list of patterns, got []"),
        ("model", 3, "model must be a table, got 3"),
        ("recipe", "zzz", "recipe 'zzz' does not exist"),
        ("seed.x", 1, "seed is a value, not a table"),
        ("engine", "fast", "engine must be 'auto', 'eager', 'compile', 'graph' or 'graph+compile'"),
        ("stage.0.optimizer.epsilon", 0, "epsilon must be > 0, got 0"),
        ("stage.0.optimizer.beta1", 1, "beta1 must be < 1, got 1"),
        ("stage.0.objectives.anchor.weight", float("nan"), "must be a finite number"),
        ("stage.0.base_every", 2, "base_every is 2, and no objective compares with the base"),
        ("stage.0.warmup_steps", 500, "warmup_steps must be below steps (500), got 500"),
        ("prompts.template", "a photo", "prompts.template must contain {subject}"),
        ("model.device", "tpu", "model.device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("name", "../x", "name must begin with a letter"),
    ],
)
def test_wrong_setting_is_refused_in_words(key: str, value: object, message: str) -> None:
    settings = [("seed", 0), (key, value)]
    with pytest.raises(UserError) as error:
        build_config("ppt-lora", settings=settings)
    assert message in str(error.value)


STAGE = "[[stage]]\n[stage.trainables.{}]\n[stage.objectives.{}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            STAGE.format("full", "denoising") + "[stage.trainables.oft]\n",
            "stage.0.trainables: oft and full all move the network, and one can at a time",
        ),
        (
            STAGE.format("full", "denoising") + STAGE.format("lora", "denoising"),
            "lora and full move the network in different stages",
        ),
        (
            STAGE.format("lora", "prior_preservation"),
            "stage.0.objectives: prior_preservation goes with denoising: add that table",
        ),
        (
            STAGE.format("lora", "denoising")
            + "[stage.objectives.prior_preservation]\n[stage.objectives.direct_consistency]\n",
            "prior_preservation and direct_consistency preserve in different ways",
        ),
        (
            STAGE.format("lora", "denoising")
            + 'weighting = "adaptive"\n[stage.objectives.prior_preservation]\n',
            "prior_preservation and adaptive weighting preserve in different ways",
        ),
        (
            STAGE.format("full", "denoising") + '[stage.objectives.anchor]\nto = "zero"\n',
            "the network's own weights at zero are no network",
        ),
        (
            STAGE.format("svdiff", "denoising") + '[stage.objectives.anchor]\nstorage = "host"\n',
            "objectives.anchor.storage: host is for anchors of the network's own weights",
        ),
        (
            STAGE.format("full", "direct_consistency")
            + '[stage.objectives.anchor]\nstorage = "host"\n',
            "an objective compares with the base, whose weights are the anchor",
        ),
        (
            STAGE.format("lora", "denoising") + '[stage.optimizer]\nmoments = "8bit"\n',
            "optimizer.moments: 8bit is for the network's own weights",
        ),
        (
            STAGE.format("oft]\nblock_size = 4\nnum_blocks = 4\n[stage.optimizer", "denoising"),
            "block_size and num_blocks say the same in two ways",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_words(
    text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        build_config(file=write(tmp_path / "run.toml", text))
    assert message in str(error.value)


def test_a_recipe_by_set_is_the_recipe() -> None:
    config = build_config("lora", settings=[("recipe", "ppt-lora")])
    assert config.recipe == "ppt-lora" and config.stage[0].objectives.anchor is not None


def test_what_a_flag_got_wrong_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "run.toml", 'recipe = "lora"\nlog_every = 0\n')
    with pytest.raises(UserError) as error:
        build_config(file=file, settings=[("seed", -1)])
    assert str(error.value).splitlines() == [
        "seed must be >= 0, got -1",
        f"{file}: log_every must be >= 1, got 0",
    ]


def test_one_stage_in_single_brackets_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"write \[\[stage\]\] with two brackets"):
        build_config(file=write(tmp_path / "run.toml", "[stage]\nsteps = 3\n"))


def test_path_that_is_no_text_is_refused() -> None:
    settings = [(key, "x") for key in ("model.path", "photos.folder", "prompts.class_noun")]
    with pytest.raises(UserError, match=r"output: .* is not text in UTF-8"):
        build_config("lora", settings=[*settings, ("output", "\udcff")])


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'ppt-lora'"):
        build_config("ppt_lora")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("a = = 1", "is not a TOML file"), ("recipe = 3", "in quotes")],
)
def test_unreadable_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "run.toml"
    if content is not None:
        write(file, content)
    with pytest.raises(UserError, match=message) as error:
        build_config(file=file)
    assert str(file) in str(error.value)


def test_stage_that_trains_or_teaches_nothing_is_refused(tmp_path: Path) -> None:
    bare = write(tmp_path / "a.toml", "[[stage]]\n[stage.objectives.denoising]\n")
    with pytest.raises(UserError, match="needs something to train"):
        build_config(file=bare)
    idle = write(tmp_path / "b.toml", "[[stage]]\n[stage.trainables.lora]\n")
    with pytest.raises(UserError, match="needs an objective that teaches"):
        build_config(file=idle)


def test_later_stage_must_keep_the_adapters(tmp_path: Path) -> None:
    stage = "[[stage]]\n[stage.trainables.lora]\nrank = {}\n[stage.objectives.denoising]\n"
    file = write(tmp_path / "run.toml", stage.format(4) + stage.format(8))
    with pytest.raises(UserError, match=r"stage\.1\.trainables\.lora\.rank must be that of stage"):
        build_config(file=file)


def test_missing_essentials_name_their_flag() -> None:
    with pytest.raises(UserError, match=r"model\.path is not set: pass --model"):
        check_complete(build_config("lora"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_say_what_they_are(name: str) -> None:
    recipe, table = load_recipe(name)
    assert recipe.summary and recipe.source
    assert set(recipe.families) <= set(FAMILY_NAMES) and len(set(recipe.families)) >= 1
    assert table["stage"]


def test_recipe_that_does_not_fit_names_its_families_and_the_recipes_that_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def for_two_families(name: str, *model: str | None) -> object:
        recipe, table = load_recipe(name, *model)
        families = ["sd", "sdxl"] if name == "ppt-lora" else ["sd3"]
        return recipe.model_copy(update={"families": families}), table

    monkeypatch.setattr(config_io, "load_recipe", for_two_families)
    config = build_config("ppt-lora", settings=[("model.path", "a/b")])
    check_recipe_fits(config, "sdxl")
    with pytest.raises(UserError) as error:
        check_recipe_fits(config, "sd3")
    assert str(error.value).startswith("recipe ppt-lora: is for sd, sdxl; a/b is sd3")
    others = ", ".join(name for name in RECIPES if name != "ppt-lora")
    assert f"(for sd3 there are: {others})" in str(error.value)


def test_a_run_without_a_recipe_fits_every_family(tmp_path: Path) -> None:
    stages = "[[stage]]\n[stage.trainables.lora]\n[stage.objectives.denoising]\n"
    config = build_config(file=write(tmp_path / "run.toml", stages))
    assert config.recipe is None
    check_recipe_fits(config, "a family of tomorrow")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("seed=0x" + "f" * 9000, r"seed must be < .*, got 0xfff.*\.\.\.$"),
        ("photos.resolution=0x" + "f" * 9000, r"photos.resolution: must be below 2\^63"),
        ("seed=" + "9" * 5000, "seed must be a whole number, got '999"),
        ("seed=[0x" + "f" * 9000 + "]", r"seed must be a whole number, got \[0xfff.*\.\.\.\]$"),
        ("sead={a=-1, b=0x" + "f" * 9000 + "}", "unknown key sead"),
        ("seed=1\nengine='auto'", "seed must be a whole number"),
        ("model.path=a\0b", "NUL"),
        (".".join(["model"] + ["path"] * 900) + "=1", "model.path must be text in quotes"),
        ("x" * 20_000 + "=1", "is over 10000 letters long"),
    ],
)
def test_absurd_values_are_refused_in_few_words(typed: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_config(settings=[parse_setting(typed)])
    assert len(str(error.value)) < 300


def test_a_path_with_a_line_break_comes_back_from_its_file(tmp_path: Path) -> None:
    config = build_config("lora", settings=[("output", "a\nb\x1b\"'ü"), ("prompts.token", "\n")])
    assert build_config(file=write(tmp_path / "run.toml", render_toml(config))) == config


@pytest.mark.parametrize("content", ["a = " + "[" * 5000, "a." * 2000 + "a = 1", "#" * 2**23])
def test_files_that_would_take_for_ever_are_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match=r"too deeply nested|dots|MiB long"):
        build_config(file=write(tmp_path / "run.toml", content))
