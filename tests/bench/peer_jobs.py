"""Jobs for other trainers, for the tests of what these are told."""

import json
from pathlib import Path

from bench.peers.jobs import PeerJob
from bench.race_plan import EntrantPlan
from bench.race_results import RaceSettings

MODELS = {"sd": "sd15", "sdxl": "sdxl", "sd3": "sd3-medium"}
ONETRAINER_CONFIG = Path("modules/util/config/TrainConfig.py")


def write_sizes(model, network, side):
    """Say in a model's folder how large its latents are, and pictures eight times as large."""
    for part, config in (
        (network, {"sample_size": side}),
        ("vae", {"block_out_channels": [8] * 4}),
    ):
        (model / part).mkdir(parents=True, exist_ok=True)
        (model / part / "config.json").write_text(json.dumps(config))


def job_of(family, tmp_path, *, prior=False, **settings):
    """Return a job with a checkout of every trainer: what is looked for is there, and no more."""
    settings = {
        "model": MODELS[family],
        "family": family,
        "resolution": 512,
        "batch_size": 2,
        "precision": "bfloat16",
        "rank": 23,
        "steps": 70,
        "class_images": 12,
        "sampler_steps": 50,
        "guidance_scale": 7.5,
        "num_photos": 5,
        "seed": 3,
        "rounds": 1,
        "threads": 1,
    } | settings
    checkout = tmp_path / "checkout"
    for name in ("train_network.py", "sdxl_train_network.py", "sd3_train_network.py"):
        checkout.mkdir(exist_ok=True)
        (checkout / name).touch()
    write_sizes(tmp_path / "model", "transformer" if family == "sd3" else "unet", 64)
    scripts = checkout / "examples" / "dreambooth"
    scripts.mkdir(parents=True, exist_ok=True)
    for suffix in ("", "_sdxl", "_sd3"):
        (scripts / f"train_dreambooth_lora{suffix}.py").touch()
    config = checkout / ONETRAINER_CONFIG
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text("super().__init__(data, config_version=10, config_migrations={})")
    return PeerJob(
        settings=RaceSettings(**settings),
        entrant=EntrantPlan(name="it", kind="external", prior=prior),
        model=str(tmp_path / "model"),
        device="cuda",
        photos=tmp_path / "photos",
        class_noun="robot",
        output=tmp_path,
        class_images=tmp_path / "class",
        sampled_images=12,
        trained_steps=70,
        checkout=checkout,
        python=tmp_path / "venv" / "bin" / "python",
        extra=("--last",),
    )
