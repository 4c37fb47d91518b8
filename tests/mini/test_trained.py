"""The weights that the package brings along: what they are, how they are read and written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import nn

from fastppt.errors import UserError
from fastppt.families.names import WORLD_MODEL
from fastppt.mini import MINI_MODELS, build_mini
from fastppt.mini.save import MOST_BYTES, save_weights
from fastppt.mini.sdxl import WEIGHTS, build_mini_sdxl, load_mini_sdxl


@pytest.fixture(scope="module")
def trained() -> Any:
    """The model as it is shipped. Read only."""
    return build_mini("mini-sdxl")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the folder, to be damaged."""
    return shutil.copytree(WEIGHTS, tmp_path / "weights")


def networks(pipeline: Any) -> dict[str, nn.Module]:
    parts = pipeline.components.items()
    return {name: part for name, part in parts if isinstance(part, nn.Module)}


def weights(pipeline: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, network in networks(pipeline).items()
        for key, tensor in network.state_dict().items()
    }


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_without_a_seed_mini_sdxl_has_the_values_of_its_files_in_float32(trained: Any) -> None:
    for name, network in networks(trained).items():
        (file,) = (WEIGHTS / name).glob("*.safetensors")
        stored = load_file(file)
        assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
        state = network.state_dict()
        assert state.keys() == stored.keys()
        assert all(torch.equal(state[key], tensor.float()) for key, tensor in stored.items())
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        assert not network.training
    assert len(networks(trained)) == 4


@pytest.mark.parametrize("model", MINI_MODELS)
def test_a_seed_gives_random_weights_and_none_is_seed_0_where_nothing_is_trained(
    model: str, trained: Any
) -> None:
    random = weights(build_mini(model, 0))
    assert not are_equal(random, weights(build_mini(model, 1)))
    found = trained if model == WORLD_MODEL else build_mini(model)
    assert are_equal(random, weights(found)) == (model != WORLD_MODEL)


def test_the_trained_model_is_built_as_the_random_one(trained: Any) -> None:
    random = build_mini_sdxl(0)
    assert type(trained) is type(random)
    shapes = [{k: t.shape for k, t in weights(each).items()} for each in (trained, random)]
    assert shapes[0] == shapes[1]
    for name, part in random.components.items():
        if hasattr(part, "config"):
            assert settings(trained.components[name].config) == settings(part.config), name
    for name in ("tokenizer", "tokenizer_2"):
        one, other = trained.components[name], random.components[name]
        text = "a photo of a sks robot, on the BEACH at 3 o'clock"
        assert one(text, padding="max_length") == other(text, padding="max_length")
        assert (one.pad_token, one.model_max_length) == (other.pad_token, other.model_max_length)
    assert trained.config.force_zeros_for_empty_prompt
    assert trained.watermark is None


def settings(config: Any) -> dict[str, Any]:
    """What a configuration says of the model, not of the file that it was read from."""
    entries = dict(config) if isinstance(config, dict) else config.to_dict()
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in entries.items()
        if not key.startswith("_") and key not in ("architectures", "dtype")
    }


def test_loading_says_nothing_and_leaves_the_random_state(
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = torch.get_rng_state()
    load_mini_sdxl()
    assert torch.equal(before, torch.get_rng_state())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("", "has no unet/config.json"),
        ("model_index.json", "model_index.json"),
        ("vae/config.json", "has no vae/config.json"),
        ("tokenizer_2/tokenizer_config.json", "has no tokenizer_2/tokenizer_config.json"),
        ("text_encoder/model.safetensors", "has no .safetensors weights"),
    ],
)
def test_a_missing_file_is_named(folder: Path, file: str, message: str) -> None:
    if file:
        (folder / file).unlink()
    else:
        shutil.rmtree(folder)
    assert message in refusal(folder)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_file_is_named(folder: Path, keep: int) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert f"{file}: is truncated" in refusal(folder)


def test_a_value_that_is_no_number_is_named(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2:] = b"\xff\x7f"
    file.write_bytes(content)
    assert "vae has NaN or infinite values" in refusal(folder)


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load_mini_sdxl(folder)
    message = str(error.value)
    assert message.startswith("mini-sdxl: the weights of the package cannot be loaded (")
    assert "install it again" in message
    assert "\n" not in message
    return message


def test_saving_the_trained_model_writes_the_files_that_are_shipped(
    trained: Any, tmp_path: Path
) -> None:
    # As pretraining does before it saves.
    trained.tokenizer(["a dog"], padding="max_length", truncation=True)
    save_weights(trained, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(WEIGHTS)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    assert {tensor.dtype for tensor in weights(trained).values()} == {torch.float32}


def test_saved_weights_load_as_float16_has_them_and_replace_what_was_there(tmp_path: Path) -> None:
    pipeline, folder = build_mini_sdxl(1), tmp_path / "some" / "weights"
    for content in ("old", "older"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "left-over.txt").write_text(content)
        save_weights(pipeline, folder)
        assert not (folder / "left-over.txt").exists()
    wanted = {key: tensor.half().float() for key, tensor in weights(pipeline).items()}
    assert are_equal(weights(load_mini_sdxl(folder)), wanted)
    assert not are_equal(weights(pipeline), wanted)
    # Of the umask's or a stricter mode, a package could not be read by those that it is not of.
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)


def test_nothing_in_the_files_is_of_the_machine_that_wrote_them(
    trained: Any, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path / "stock")
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / "stock", add_watermarker=False)
    save_weights(stock, tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(WEIGHTS)


def test_weights_over_the_limit_are_refused_and_what_was_there_stays(
    folder: Path, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(folder)
    monkeypatch.setattr("fastppt.mini.save.MOST_BYTES", 7_000_000)
    with pytest.raises(ValueError, match=r"weights take 7,9\d\d,\d\d\d bytes in float16"):
        save_weights(trained, folder)
    assert contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_the_weights_are_within_the_limit() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*.safetensors")) <= MOST_BYTES
