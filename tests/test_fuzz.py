"""Whatever is in a file or on the command line: a result or a message, soon, and nothing half done.

Hypothesis makes the cases, the same ones each time: 200 in the fast tests, 10,000 in the slow ones.
"""

from __future__ import annotations

import io
import json
import math
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import save
from typer.testing import CliRunner

from fastppt.cli import app
from fastppt.config import RunConfig
from fastppt.config_io import RECIPES, build_config, check_complete, parse_setting, render_toml
from fastppt.config_types import section_type
from fastppt.console import SafeConsole
from fastppt.data.photos import crop_photo, find_photos
from fastppt.errors import UserError
from fastppt.families.checkpoints import family_of_checkpoint
from fastppt.families.loading import check_model
from fastppt.outputs.convert import convert
from fastppt.outputs.folder import check_output
from fastppt.outputs.info import print_info, read_info
from fastppt.outputs.lora_forms import read_lora

# Milliseconds that a case may take.
DEADLINE = 5000

Strategy = st.SearchStrategy[Any]


def fuzz(property_: Callable[..., None], share: float, **strategies: Strategy) -> Any:
    """Return a test of a property with its share of the cases."""

    @pytest.mark.parametrize("num_all", [200, pytest.param(10_000, marks=pytest.mark.slow)])
    def test(num_all: int) -> None:
        run = given(**strategies)(property_)
        limits = settings(
            max_examples=round(share * num_all),
            deadline=DEADLINE,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        limits(run)()

    test.__doc__ = property_.__doc__
    return test


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@st.composite
def mutated(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """A real file with a few edits, or bytes of no file."""
    content = bytearray(draw(st.sampled_from(originals) | st.binary(max_size=200)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["set", "insert", "delete", "cut", "repeat"])):
            case "set" if content:
                content[place] = draw(st.integers(0, 255))
            case "insert":
                content[place:place] = draw(st.binary(max_size=12))
            case "delete":
                del content[place : place + draw(st.integers(1, 20))]
            case "cut":
                del content[place:]
            case "repeat":
                content[place:place] = content[place : place + 30] * draw(st.integers(1, 50))
    return bytes(content)


# Configurations.

WORDS = st.text(max_size=12) | st.sampled_from(
    [*RECIPES, "mini-sdxl", "a/b", "/", "", "\0", "..", "up", "auto", "x" * 300, "{subject}", "nan"]
)
NUMBERS = (
    st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from([0, 1, -1, 2**63, 10**4000, 1e308, float("nan"), float("inf")])
)
VALUES = st.recursive(
    st.booleans() | NUMBERS | WORDS | st.dates() | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)


def key_paths(section: type[BaseModel], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of the schema; those of stages begin with stage.0."""
    found = []
    for name, field in section.model_fields.items():
        own = section_type(field.annotation)
        here = (*path, name, "0") if name == "stage" else (*path, name)
        found.append(here)
        found += key_paths(own, here) if own is not None else []
    return found


KEYS = st.sampled_from([".".join(path) for path in key_paths(RunConfig)]) | st.text(max_size=20)
# What Python has trouble with as a number, or as a nest.
TYPED = st.text(max_size=20) | st.sampled_from(["0x" + "f" * 9000, "9" * 5000, "[" * 3000])
SETTINGS = st.lists(st.tuples(KEYS, VALUES), max_size=4)


def try_config(**source: Any) -> None:
    """Read a configuration and look at what it names, as `fastppt train` does before it loads."""
    with suppress(UserError):
        config = build_config(**source)
        with scratch() as folder:
            text = render_toml(config)
            (folder / "again.toml").write_text(text, encoding="utf-8")
            assert build_config(file=folder / "again.toml") == config
        check_complete(config)
        check_model(config.model)
        check_output(config, overwrite=False)


def reads_settings(chosen: list[tuple[str, Any]], typed: list[str]) -> None:
    """Keys of the schema and others, with values of any kind, and what is typed after --set."""
    with suppress(UserError):
        parsed = [parse_setting(text) for text in typed]
        try_config(settings=[*chosen, *parsed])


def reads_config_files(table: dict[str, Any], chosen: list[tuple[str, Any]]) -> None:
    """TOML of the schema's keys."""
    for key, value in chosen:
        parts = [part for part in key.split(".") if part != "0"]
        here: Any = table
        for part in parts[:-1]:
            here = here.setdefault(part, {}) if isinstance(here, dict) else {}
        if isinstance(here, dict):
            here[parts[-1] if parts else key] = value
    if isinstance(table.get("stage"), dict):
        table["stage"] = [table["stage"]]
    with scratch() as folder:
        with suppress(ValueError, RecursionError):
            (folder / "run.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
        try_config(file=folder / "run.toml")


def reads_config_bytes(content: bytes) -> None:
    """A configuration with bytes changed."""
    with scratch() as folder:
        (folder / "run.toml").write_bytes(content)
        try_config(file=folder / "run.toml")


DEEP = b'"a.png" = ' + b"[" * 5000
WHOLE_CONFIG = render_toml(build_config("ppt-lora")).encode()
SMALL_CONFIG = b'recipe = "lora"\n[[stage]]\nsteps = 3\n[stage.trainables.lora]\nrank = 4\n'

test_settings = fuzz(
    reads_settings,
    0.15,
    chosen=SETTINGS,
    typed=st.lists(
        st.builds("{}={}".format, KEYS, TYPED | VALUES) | st.text(max_size=30),
        max_size=3,
    ),
)
test_config_files = fuzz(
    reads_config_files, 0.15, table=st.dictionaries(WORDS, VALUES, max_size=2), chosen=SETTINGS
)
test_config_bytes = fuzz(
    reads_config_bytes, 0.13, content=mutated([WHOLE_CONFIG, SMALL_CONFIG, DEEP])
)

# Photos and captions.


def pictures() -> list[bytes]:
    """Small pictures of each format."""
    pixels = np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 50
    found = []
    for kind in ("PNG", "JPEG", "WEBP"):
        for mode, options in (("RGB", {"exif": exif}), ("L", {}), ("RGBA", {})):
            if (kind, mode) == ("JPEG", "RGBA"):
                mode, options = "CMYK", {"progressive": True}
            buffer = io.BytesIO()
            Image.fromarray(pixels).convert(mode).save(buffer, format=kind, **options)
            found.append(buffer.getvalue())
    return found


PICTURES = pictures()


CHUNKS = [b"eXIf", b"zTXt", b"iTXt", b"tEXt", b"iCCP", b"tRNS", b"PLTE", b"acTL", b"fcTL", b"fdAT"]
CHUNKS += [b"gAMA", b"cHRM", b"pHYs", b"sRGB", b"IHDR", b"IDAT", b"IEND"]


@st.composite
def pngs(draw: st.DrawFn) -> bytes:
    """A PNG with chunks of any content, whose checksums are right."""
    content = bytearray(PICTURES[draw(st.sampled_from([0, 1, 2]))])
    for _ in range(draw(st.integers(1, 3))):
        # Behind the signature and the header, or before the last chunk.
        place = draw(st.sampled_from([33, len(content) - 12]))
        text = st.sampled_from([b"Raw profile type exif\0\0", b"XML:com.adobe.xmp\0" + bytes(4)])
        body = draw(st.sampled_from(CHUNKS)) + draw(st.just(b"") | text) + draw(st.binary())
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        content[place:place] = chunk
    return bytes(content)


@st.composite
def with_exif(draw: st.DrawFn) -> bytes:
    """A picture with EXIF data of any content."""
    tags = st.binary(max_size=60) | st.builds(
        lambda tag, kind, count, value: struct.pack("<HHHII", 1, tag, kind, count, value),
        st.sampled_from([0x0112, 0x8769, 0x010E]) | st.integers(0, 65535),
        st.integers(0, 15),
        st.integers(0, 2**32 - 1) | st.integers(0, 3),
        st.integers(0, 2**32 - 1) | st.integers(0, 9),
    )
    exif = b"Exif\0\0II*\0\x08\0\0\0" + draw(tags) + draw(st.binary(max_size=20))
    buffer = io.BytesIO()
    kind = draw(st.sampled_from(["PNG", "JPEG", "WEBP"]))
    Image.new("RGB", (20, 24)).save(buffer, format=kind, exif=exif)
    return buffer.getvalue()


def reads_photos(content: bytes, name: str) -> None:
    """A picture with bytes changed, under any name."""
    with scratch() as folder:
        (folder / name).write_bytes(content)
        with suppress(UserError):
            (photo,) = find_photos(folder)
            crop = crop_photo(photo, (16, 24))
            assert crop.pixels.shape == (3, 16, 24) and crop.pixels.isfinite().all()


def reads_captions(table: dict[str, Any], toml: bytes, text: bytes | None, elsewhere: bool) -> None:
    """A captions.toml of any content, and a .txt file."""
    with scratch() as folder:
        (folder / "a.png").write_bytes(PICTURES[0])
        (folder / "ä b.jpg").write_bytes(PICTURES[3])
        place = folder / "captions" if elsewhere else folder
        place.mkdir(exist_ok=True)
        with suppress(ValueError, RecursionError):
            toml += tomli_w.dumps(table).encode()
        (place / "captions.toml").write_bytes(toml)
        if text is not None:
            (place / "a.txt").write_bytes(text)
        with suppress(UserError):
            for photo in find_photos(folder, place if elsewhere else None):
                assert photo.caption is None or photo.caption.strip()


test_photos = fuzz(
    reads_photos,
    0.2,
    content=mutated(PICTURES) | pngs() | with_exif(),
    name=st.sampled_from(["a.png", "a.jpg", "a.webp", "-\n.PNG", "\x1b[2J.jpeg"]),
)
test_captions = fuzz(
    reads_captions,
    0.15,
    table=st.dictionaries(st.sampled_from(["a.png", "ä b.jpg"]) | WORDS, VALUES, max_size=2),
    toml=st.just(b"") | mutated([b'"a.png" = "on a {subject}"\n', DEEP]),
    text=st.none() | st.binary(max_size=20),
    elsewhere=st.booleans(),
)

# LoRA files.

LAYER = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = "lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def lora_files() -> list[bytes]:
    """Small files of the forms."""
    down, up = torch.ones(2, 4), torch.ones(4, 2)
    alphas = json.dumps({"unet.lora_alpha": 4, "unet.r": 2, "unet.alpha_pattern": {"to_q": 1.5}})
    dotted = {f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up}
    kohya = {f"{KOHYA}.lora_down.weight": down, f"{KOHYA}.lora_up.weight": up.bfloat16()}
    return [
        save(dotted, metadata={"lora_adapter_metadata": alphas}),
        save(kohya | {f"{KOHYA}.alpha": torch.tensor(1.0)}, metadata={"ss_network_dim": "2"}),
        save({"clip_l": torch.ones(1, 8), "clip_g": torch.ones(1, 12)}),
    ]


LORA_FILES = lora_files()
DTYPES = ["F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E8M0", "F4", "I64", "BOOL", "C64", "U16", "X"]
BITS = {"F16": 16, "BF16": 16, "F64": 64, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "I64": 64, "BOOL": 8}
BITS |= {"C64": 64, "U16": 16}
# The two sides of an adapter, and its alpha.
PAIRS = [
    [f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"],
    [f"{KOHYA}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")],
]
SHAPES = [((2, 4), (4, 2)), ((0, 4), (4, 0)), ((2, 0), (0, 2)), ((2, 4, 1, 1), (4, 2, 1, 1))]
SHAPES += [((2, 4), (4, 3)), ((), ()), ((2, 4, 3, 3), (4, 2, 1, 1))]
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS.filter(lambda n: abs(n) < 10**400) | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def safetensors_files(draw: st.DrawFn) -> bytes:
    """Files with a header of the right shape and wrong entries."""
    endings = [".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".alpha"]
    names = st.builds(
        "".join,
        st.tuples(
            st.sampled_from([LAYER, KOHYA, "unet.a", "text_encoder.x", "transformer.", "clip_l"]),
            st.sampled_from([*endings, ".dora_scale", ""]),
        ),
    )
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(names | WORDS, max_size=4, unique=True)):
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 4, 2**62]), max_size=4))
        size = draw(st.sampled_from([4, 32, 64]) | st.integers(0, 100))
        if draw(st.booleans()):
            shape, size = draw(st.sampled_from([([2, 4], 32), ([4, 2], 32), ([], 4)]))
        offsets = draw(st.just([end, end + size]) | st.lists(st.integers(0, 200), max_size=2))
        kind = draw(st.just("F32") | st.sampled_from(DTYPES))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
        end += size
    if draw(st.booleans()):
        names_, shapes = draw(st.sampled_from(PAIRS)), draw(st.sampled_from(SHAPES))
        for name, shape in zip(names_, (*shapes, ()), strict=False):
            kind = draw(st.just("F32") | st.sampled_from([kind for kind in DTYPES if kind != "X"]))
            size = math.prod(shape) * BITS.get(kind, 32) // 8
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
            end += size
    if draw(st.booleans()):
        patterns = st.dictionaries(st.sampled_from(["to_q", "^(a+)+$", ".*", LAYER]), JSON)
        entry = {
            "unet.lora_alpha": draw(st.just(4) | JSON),
            "unet.alpha_pattern": draw(patterns | JSON),
        }
        text = st.sampled_from([json.dumps(entry), "[" * 9000]) | WORDS
        keys = ["lora_adapter_metadata", "format", "ss_base_model_version", "modelspec.hash_sha256"]
        header["__metadata__"] = draw(st.dictionaries(st.sampled_from(keys) | WORDS, text))
    content = json.dumps(header).encode()
    length = draw(st.just(len(content)) | st.sampled_from([0, 2**20, 2**63]))
    return struct.pack("<Q", length) + content + bytes(max(0, end))


def reads_lora_files(content: bytes, form: str) -> None:
    """A LoRA file with bytes or entries changed: read, described, written in another form."""
    with scratch() as folder:
        file, target = folder / "a.safetensors", folder / "b.safetensors"
        file.write_bytes(content)
        target = folder / "b" if form == "peft" else target
        with suppress(UserError):
            print_info(read_info(file), SafeConsole(file=io.StringIO()))
        with suppress(UserError):
            family_of_checkpoint(file)
        try:
            convert(file, form, target, None)
        except UserError:
            assert list(folder.iterdir()) == [file]
        else:
            assert read_lora(target).adapters.keys() == read_lora(file).adapters.keys()
            assert set(folder.iterdir()) == {file, target}


test_lora_files = fuzz(
    reads_lora_files,
    0.2,
    content=safetensors_files() | mutated(LORA_FILES),
    form=st.sampled_from(["kohya", "diffusers", "peft"]),
)

# Commands.


def runs_commands(content: bytes, picture: bytes, lora: bytes, more: list[str]) -> None:
    """Commands as typed, on files with bytes changed: exit code 0 or 2, and no output by halves."""
    with scratch() as folder:
        run, photos, output = folder / "run.toml", folder / "photos", folder / "out"
        run.write_bytes(content)
        photos.mkdir()
        # Cut short, so that no training ever starts.
        (photos / "a.png").write_bytes(picture[: len(picture) // 2])
        (folder / "a.safetensors").write_bytes(lora)
        train = ["train", str(run), "--photos", str(photos), "--output", str(output)]
        commands = [
            [*train, "--class-noun", "dog", "--model", "mini-sdxl", "--device", "cpu", *more],
            ["config", str(run), *more],
            ["info", str(folder / "a.safetensors")],
        ]
        for command in commands:
            result = CliRunner().invoke(app, command)
            assert result.exit_code in (0, 2), (command, result.output)
        assert not output.exists()


test_commands = fuzz(
    runs_commands,
    0.02,
    content=mutated([WHOLE_CONFIG, SMALL_CONFIG]),
    picture=mutated(PICTURES),
    lora=mutated(LORA_FILES),
    more=st.lists(
        st.builds("--set={}={}".format, KEYS, VALUES).filter(lambda text: "\0" not in text),
        max_size=1,
    ),
)
