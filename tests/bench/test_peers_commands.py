import json
import tomllib
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from bench.peers.trainers import TRAINERS
from bench.race_plan import T5_TOKENS
from fastppt.errors import UserError
from tests.bench.peer_jobs import ONETRAINER_CONFIG, job_of

PAIRS = [(name, family) for name, trainer in TRAINERS.items() for family in trainer.families]
LAUNCHED = [(name, family) for name, family in PAIRS if name in ("diffusers", "kohya")]
# As diffusers' pipelines name it.
WEIGHTS = "pytorch_lora_weights.safetensors"
KINDS = (".json", ".toml", ".yaml", ".txt")


def options_of(command):
    pairs = (word.removeprefix("--").split("=", 1) for word in command.words if "=" in word)
    return dict(pairs)


def read_onetrainer(job):
    TRAINERS["onetrainer"].command(job)
    return json.loads((job.output / "onetrainer.json").read_text())


def read_simpletuner(job):
    """Return its configuration, and that of the photos."""
    command = TRAINERS["simpletuner"].command(job)
    config = json.loads((command.folder / "config" / "config.json").read_text())
    return config, json.loads(Path(config["data_backend_config"]).read_text())[0]


def read_ai_toolkit(job):
    command = TRAINERS["ai-toolkit"].command(job)
    config = yaml.safe_load(Path(command.words[2]).read_text())["config"]
    (process,) = config["process"]
    return config["name"], process


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_each_command_names_what_the_race_fixes(name, family, tmp_path):
    extra = () if name == "simpletuner" else ("--last",)
    job = job_of(family, tmp_path).model_copy(update={"extra": extra})
    command = TRAINERS[name].command(job)
    words = " ".join(command.words)
    # What a file says counts as said.
    texts = [words, *(p.read_text() for p in tmp_path.rglob("*") if p.suffix in KINDS)]
    said = "\n".join(texts)
    for wanted in (job.model, str(job.photos), job.prompts[0], "512", "23"):
        assert wanted in said, wanted
    assert name == "simpletuner" or command.words[-1] == "--last"
    assert command.variables["TQDM_MININTERVAL"] == "0"
    assert command.variables["PATH"].startswith(str(job.python.parent))
    assert "--with_prior_preservation" not in words


@pytest.mark.parametrize(("name", "family"), [*LAUNCHED, ("simpletuner", "sdxl")])
def test_launched_trainers_are_one_process_whatever_the_user_has_configured(name, family, tmp_path):
    job = job_of(family, tmp_path).model_copy(update={"extra": ()})
    command = TRAINERS[name].command(job)
    path = str(tmp_path / "accelerate.json")
    if name == "simpletuner":
        assert f"accelerate_config={path}" in command.words
    else:
        assert command.words[3:5] == ["--config_file", path]
    config = load_config_from_file(path)
    assert (config.distributed_type.value, config.num_processes, config.num_machines) == (
        "NO",
        1,
        1,
    )
    assert (config.mixed_precision, config.use_cpu) == ("bf16", False)


def test_on_the_cpu_the_launcher_is_told_so(tmp_path):
    job = job_of("sd", tmp_path, precision="float32").model_copy(update={"device": "cpu"})
    assert "--cpu" not in TRAINERS["diffusers"].command(job_of("sd", tmp_path)).words
    assert "--cpu" in TRAINERS["diffusers"].command(job).words
    config = load_config_from_file(str(tmp_path / "accelerate.json"))
    assert (config.mixed_precision, config.use_cpu) == ("no", True)


def test_each_trainer_writes_where_its_result_is_looked_for(tmp_path):
    job = job_of("sdxl", tmp_path).model_copy(update={"extra": ()})
    name, process = read_ai_toolkit(job)
    kohya = options_of(TRAINERS["kohya"].command(job))
    written = {
        "kohya": Path(kohya["output_dir"]) / f"{kohya['output_name']}.{kohya['save_model_as']}",
        "onetrainer": Path(read_onetrainer(job)["output_model_destination"]),
        "simpletuner": Path(read_simpletuner(job)[0]["output_dir"]) / WEIGHTS,
        "ai-toolkit": Path(process["training_folder"]) / name / f"{name}.safetensors",
        "diffusers": Path(options_of(TRAINERS["diffusers"].command(job))["output_dir"]) / WEIGHTS,
    }
    assert written == {key: tmp_path / trainer.result for key, trainer in TRAINERS.items()}


def test_diffusers_is_told_what_its_documentation_says(tmp_path):
    command = TRAINERS["diffusers"].command(job_of("sdxl", tmp_path, prior=True))
    options = options_of(command)
    assert "--with_prior_preservation" in command.words
    assert options["num_class_images"] == "12"
    assert options["class_prompt"] == "a photo of a robot"
    assert options["max_train_steps"] == "70" and options["checkpointing_steps"] == "71"
    assert options["train_batch_size"] == "2" and options["rank"] == "23"
    assert options["mixed_precision"] == "bf16"
    assert command.words[1:3] == ["-m", "accelerate.commands.launch"]


@pytest.mark.parametrize(("family", "repeats"), [("sd", None), ("sdxl", "2"), ("sd3", "2")])
def test_diffusers_repeats_photos_where_it_can_so_that_batches_are_whole(family, repeats, tmp_path):
    command = TRAINERS["diffusers"].command(job_of(family, tmp_path, batch_size=2))
    assert options_of(command).get("repeats") == repeats


def test_rank_and_alpha_are_the_races(tmp_path):
    job = job_of("sdxl", tmp_path)
    assert options_of(TRAINERS["diffusers"].command(job))["rank"] == "23"
    kohya = options_of(TRAINERS["kohya"].command(job))
    assert (kohya["network_dim"], kohya["network_alpha"]) == ("23", "23")
    onetrainer = read_onetrainer(job)
    assert (onetrainer["lora_rank"], onetrainer["lora_alpha"]) == (23, 23)
    simpletuner, _ = read_simpletuner(job.model_copy(update={"extra": ()}))
    assert (simpletuner["lora_rank"], simpletuner["lora_alpha"]) == (23, 23)
    network = read_ai_toolkit(job)[1]["network"]
    assert (network["linear"], network["linear_alpha"]) == (23, 23)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_class_images_of_another_size_than_the_models_own_are_refused(tmp_path, family):
    command = TRAINERS["diffusers"].command
    assert command(job_of(family, tmp_path, prior=True))
    # Without class images any size will do.
    assert command(job_of(family, tmp_path, resolution=256))
    with pytest.raises(UserError, match=r"the model's own size, 512, .* the race has 256; run the"):
        command(job_of(family, tmp_path, prior=True, resolution=256))


def test_a_model_that_does_not_say_its_size_is_named(tmp_path):
    job = job_of("sdxl", tmp_path, prior=True)
    (tmp_path / "model" / "vae" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"--model .*vae/config.json do not say what size"):
        TRAINERS["diffusers"].command(job)


def test_kohya_reads_a_dataset_of_the_photos_whose_epoch_has_all_steps(tmp_path):
    command = TRAINERS["kohya"].command(job_of("sdxl", tmp_path))
    dataset = tomllib.loads(Path(options_of(command)["dataset_config"]).read_text())
    (found,) = dataset["datasets"]
    assert (found["resolution"], found["batch_size"]) == (512, 2)
    (subset,) = found["subsets"]
    assert subset["class_tokens"] == "a photo of sks robot"
    # Any 5 photos make whole batches, and enough of them.
    assert subset["num_repeats"] % 2 == 0 and 5 * subset["num_repeats"] / 2 >= 70


@pytest.mark.parametrize(("family", "tokens"), [("sdxl", None), ("sd3", str(T5_TOKENS))])
def test_kohya_takes_as_many_tokens_as_the_race(family, tokens, tmp_path):
    command = TRAINERS["kohya"].command(job_of(family, tmp_path))
    assert options_of(command).get("t5xxl_max_token_length") == tokens


def test_onetrainer_has_one_epoch_of_all_steps(tmp_path):
    config = read_onetrainer(job_of("sd", tmp_path))
    (concept,) = config["concepts"]
    assert config["epochs"] == 1
    assert (concept["balancing"], concept["balancing_strategy"]) == (140.0, "SAMPLES")
    assert Path(concept["text"]["prompt_path"]).read_text() == "a photo of sks robot"


@pytest.mark.parametrize(
    ("family", "network", "timesteps"),
    [("sdxl", "unet", "UNIFORM"), ("sd3", "transformer", "LOGIT_NORMAL")],
)
def test_onetrainer_is_told_in_its_own_version(family, network, timesteps, tmp_path):
    config = read_onetrainer(job_of(family, tmp_path))
    # Of a file without a version, version 10 and later fail to read the parts.
    assert config["__version"] == 10
    assert config[network] == {"train": True, "weight_dtype": "BFLOAT_16"}
    # Which in that version is one of several words.
    assert config["gradient_checkpointing"] == "OFF"
    assert config["timestep_distribution"] == timesteps
    assert config["optimizer"] == {"optimizer": "ADAMW", "fused": True}
    assert "weight_dtype" not in config


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("config_version=9,", "of version 9, and 10 or newer is needed; check out a newer one"),
        ("", "of version unknown, and 10"),
        (None, "there is no .*TrainConfig.py. Is the path right?"),
    ],
)
def test_a_onetrainer_that_would_pass_over_keys_is_refused(source, message, tmp_path):
    job = job_of("sd", tmp_path)
    path = job.checkout / ONETRAINER_CONFIG
    path.unlink()
    if source is not None:
        path.write_text(source)
    with pytest.raises(UserError, match=message):
        TRAINERS["onetrainer"].command(job)


def test_ai_toolkit_reads_yaml_with_the_name_of_its_bar(tmp_path):
    name, process = read_ai_toolkit(job_of("sd3", tmp_path))
    assert name == TRAINERS["ai-toolkit"].bar
    assert process["train"]["steps"] == 70
    assert process["model"]["is_v3"] is True


def test_ai_toolkit_takes_whole_batches_of_squares(tmp_path):
    _, process = read_ai_toolkit(job_of("sdxl", tmp_path, batch_size=2))
    (dataset,) = process["datasets"]
    assert (dataset["square_crop"], dataset["num_repeats"]) == (True, 2)


def test_simpletuner_starts_where_its_configuration_is(tmp_path):
    job = job_of("sdxl", tmp_path).model_copy(update={"extra": ()})
    config, photos = read_simpletuner(job)
    assert config["max_train_steps"] == 70
    assert photos["instance_prompt"] == "a photo of sks robot"
    (_, text) = json.loads(Path(config["data_backend_config"]).read_text())
    assert text["dataset_type"] == "text_embeds"


def test_simpletuner_is_told_what_it_would_choose_otherwise(tmp_path):
    job = job_of("sdxl", tmp_path, seed=0, threads=3).model_copy(update={"extra": ()})
    config, photos = read_simpletuner(job)
    # By default one of a hub.
    assert config["pretrained_vae_model_name_or_path"] == job.model
    assert config["lora_dropout"] == 0.0
    assert config["tokenizer_max_length"] == T5_TOKENS
    assert config["torch_num_threads"] == 3
    # 0 is the time of day.
    assert config["seed"] == 1
    # A photo comes once, and so many times more.
    assert 5 * (photos["repeats"] + 1) / 2 >= 70


def test_words_that_simpletuner_would_not_read_are_refused(tmp_path):
    with pytest.raises(UserError, match="-- --last: simpletuner reads its configuration alone"):
        TRAINERS["simpletuner"].command(job_of("sdxl", tmp_path))


@pytest.mark.parametrize(
    ("name", "family", "settings", "prior", "message"),
    [
        ("simpletuner", "sd", {}, False, "is run on sdxl, sd3, and the model is sd"),
        ("simpletuner", "sdxl", {"precision": "float32"}, False, "bfloat16, not in float32"),
        ("simpletuner", "sdxl", {"model": "mini-sdxl"}, False, "simpletuner encodes text as 77"),
        ("simpletuner", "sdxl", {"model": __file__}, False, "a model of sdxl as a folder alone"),
        ("kohya", "sd", {"model": "mini-sd"}, False, "networks of the published sizes alone"),
        ("kohya", "sd", {}, True, "--prior: kohya samples no class images itself"),
        ("diffusers", "sd", {"model": __file__}, False, "reads a model of sd as a folder alone"),
        ("kohya", "sd3", {}, False, "reads a model of sd3 as a file alone"),
        ("ai-toolkit", "sd3", {"model": __file__}, False, "a model of sd3 as a folder alone"),
        ("diffusers", "sd", {"sampler_steps": 25}, True, "in 50 steps with guidance 7.5 and"),
        ("diffusers", "sdxl", {}, True, "with guidance 5 and cannot be told other"),
    ],
)
def test_what_a_trainer_cannot_do_is_refused(tmp_path, name, family, settings, prior, message):
    found = job_of(family, tmp_path, **settings).settings
    with pytest.raises(UserError, match=message):
        TRAINERS[name].check(name, found, "cuda", prior=prior)


def test_a_trainer_that_needs_a_gpu_is_refused_without(tmp_path):
    settings = job_of("sdxl", tmp_path).settings
    TRAINERS["simpletuner"].check("simpletuner", settings, "cuda", prior=False)
    with pytest.raises(UserError, match="--device cpu: simpletuner trains on cuda alone"):
        TRAINERS["simpletuner"].check("simpletuner", settings, "cpu", prior=False)
    TRAINERS["onetrainer"].check("onetrainer", settings, "cpu", prior=False)


@pytest.mark.parametrize("name", ["diffusers", "kohya", "onetrainer", "ai-toolkit"])
@pytest.mark.parametrize("is_second", [False, True])
def test_a_model_of_the_second_version_goes_to_those_who_can_tell(name, is_second, tmp_path):
    settings = job_of("sd", tmp_path, model=str(tmp_path / "model")).settings
    config = tmp_path / "model" / "unet" / "config.json"
    config.write_text(json.dumps({"use_linear_projection": is_second}))
    if is_second and name != "diffusers":
        with pytest.raises(UserError, match=f"2.x, and the command for {name} is of 1.x"):
            TRAINERS[name].check(name, settings, "cuda", prior=False)
    else:
        TRAINERS[name].check(name, settings, "cuda", prior=False)
