"""Class images: counted, hashed, kept for other runs, and never used by halves."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fastppt.config import ModelConfig, RunConfig
from fastppt.data.class_images import ClassImages
from fastppt.errors import UserError
from fastppt.families.base import Family, PromptEmbeddings
from fastppt.families.loading import load_family
from fastppt.outputs.image_cache import MANIFEST_FILE
from fastppt.trainables.trainables import Trainables
from fastppt.training.class_images import find_class_images, fingerprint_painter
from fastppt.training.interrupt import IMAGES_KEPT, Interrupted, Interruption
from fastppt.training.loop import resolve
from fastppt.training.sampler import Sampler
from tests.training.class_steps import PRIOR

MakeConfig = Callable[..., RunConfig]
COUNT = 5


@pytest.fixture(scope="module")
def painter() -> Family:
    """A model that draws; nothing is put into it."""
    return load_family(ModelConfig(path="mini-sd3", device="cpu"))


@dataclass
class Cache:
    """Class images of `COUNT` pictures, two at a time, in a cache of the test's own."""

    make_config: MakeConfig
    family: Family
    root: Path
    batches: list[list[int]] = field(default_factory=list)
    console: Console = field(default_factory=lambda: Console(file=StringIO(), width=200))

    def find(self, weights: str = "w", **settings: object) -> ClassImages:
        """What a run finds or draws."""
        config = self.config(**settings)
        trainables = Trainables()
        return find_class_images(config, self.family, trainables, weights, self.console, None)[0]

    def config(self, **settings: object) -> RunConfig:
        own: dict[str, object] = {
            "num_images": COUNT,
            "batch_size": 2,
            "steps": 2,
            "cache": str(self.root),
        }
        keys = {f"{PRIOR}.{key}": value for key, value in own.items()}
        keys |= {key.replace("prior__", f"{PRIOR}."): value for key, value in settings.items()}
        model = self.family.model.path
        return resolve(self.make_config("lora", **{"model.path": model}, **keys), self.family)

    def said(self) -> str:
        return self.console.file.getvalue()


@pytest.fixture
def cache(
    make_config: MakeConfig, painter: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Cache:
    made = Cache(make_config, painter, tmp_path / "cache")
    draw = Sampler.draw

    def noted(sampler: Sampler, seeds: list[int]) -> object:
        made.batches.append(list(seeds))
        return draw(sampler, seeds)

    monkeypatch.setattr(Sampler, "draw", noted)
    return made


def bytes_of(images: ClassImages) -> list[bytes]:
    return [picture.path.read_bytes() for picture in images.pictures]


def test_class_images_are_counted_hashed_and_reused(cache: Cache) -> None:
    first = cache.find()
    assert [picture.path.name for picture in first.pictures] == [
        f"{number:06d}.png" for number in range(COUNT)
    ]
    assert len(set(bytes_of(first))) == COUNT
    digests = [hashlib.sha256(content).hexdigest() for content in bytes_of(first)]
    assert list(first.hashes.values()) == digests
    assert (first.num_reused, cache.batches) == (0, [[0, 1], [2, 3], [4, 5]])
    assert [picture.size for picture in first.pictures] == [(32, 32)] * COUNT
    second = cache.find()
    assert (second.num_reused, len(cache.batches)) == (COUNT, 3)
    assert (second.pictures, second.hashes) == (first.pictures, first.hashes)
    settings = "5, euler, 2 steps, guidance 7"
    assert f"class images: {settings}; 5 drawn, 0 reused; " in cache.said()
    assert f"class images: {settings}; 0 drawn, 5 reused; " in cache.said()


def test_deleting_one_regenerates_exactly_that_one(cache: Cache) -> None:
    first = cache.find()
    contents = bytes_of(first)
    times = [picture.path.stat().st_mtime_ns for picture in first.pictures]
    first.pictures[2].path.unlink()
    cache.batches.clear()
    second = cache.find()
    # With the one beside it, as the first time.
    assert (second.num_reused, cache.batches) == (COUNT - 1, [[2, 3]])
    assert bytes_of(second) == contents
    again = [picture.path.stat().st_mtime_ns for picture in second.pictures]
    assert [a == b for a, b in zip(again, times, strict=True)] == [True, True, False, True, True]


def test_more_of_them_begin_with_those_that_are_there(cache: Cache, tmp_path: Path) -> None:
    few = cache.find(prior__num_images=3)
    cache.batches.clear()
    more = cache.find()
    assert (more.num_reused, cache.batches) == (3, [[2, 3], [4, 5]])
    assert bytes_of(more)[:3] == bytes_of(few)
    assert bytes_of(more) == bytes_of(cache.find(prior__cache=str(tmp_path / "other")))
    assert bytes_of(cache.find(prior__num_images=2)) == bytes_of(few)[:2]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_one_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def forget(path: Path) -> None:
    """As if the process had ended between a picture and its hash."""
    manifest = json.loads(path.with_name(MANIFEST_FILE).read_text())
    del manifest["images"][path.name]
    path.with_name(MANIFEST_FILE).write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", [cut, change_one_byte, forget])
def test_what_is_half_written_or_damaged_is_drawn_again(
    cache: Cache, damage: Callable[[Path], None]
) -> None:
    first = cache.find()
    contents, victim = bytes_of(first), first.pictures[4].path
    damage(victim)
    leftover = victim.with_name(f".{victim.name}.99.tmp")
    leftover.write_bytes(b"half")
    cache.batches.clear()
    second = cache.find()
    assert (second.num_reused, cache.batches) == (COUNT - 1, [[4, 5]])
    assert bytes_of(second) == contents
    assert not leftover.exists()
    assert cache.find().num_reused == COUNT


@pytest.mark.parametrize(
    "content",
    ["{", *(pytest.param(text, marks=pytest.mark.slow) for text in ("", '{"format": 2}'))],
)
def test_a_manifest_that_cannot_be_read_vouches_for_nothing(cache: Cache, content: str) -> None:
    first = cache.find(prior__num_images=2)
    first.pictures[0].path.with_name(MANIFEST_FILE).write_text(content)
    assert cache.find(prior__num_images=2).num_reused == 0
    assert cache.find(prior__num_images=2).num_reused == 2


@pytest.mark.parametrize(
    "change",
    [
        {"prior__steps": 3},
        {"prior__guidance_scale": 2.0},
        {"prior__seed": 1},
        {"prior__batch_size": 1},
        {"prompts.class_noun": "toy"},
        {"photos.resolution": 64},
        {"weights": "v"},
    ],
)
def test_another_request_is_drawn_for_itself(cache: Cache, change: dict[str, object]) -> None:
    first = cache.find(prior__num_images=1)
    second = cache.find(prior__num_images=1, **change)
    assert second.num_reused == 0
    assert second.pictures[0].path.parent != first.pictures[0].path.parent
    # The weights are told, not changed; another batch size may round in another way.
    if "prior__batch_size" not in change:
        assert (bytes_of(first) == bytes_of(second)) == ("weights" in change)


@pytest.mark.slow
def test_another_sampler_draws_for_itself(cache: Cache) -> None:
    cache.family = load_family(ModelConfig(path="mini-sdxl", device="cpu"))
    first = cache.find(prior__num_images=1)
    second = cache.find(prior__num_images=1, prior__sampler="ddim")
    assert second.num_reused == 0
    assert bytes_of(first) != bytes_of(second)


@pytest.mark.slow
def test_weight_and_output_are_no_matter_of_the_pictures(cache: Cache, tmp_path: Path) -> None:
    cache.find(prior__num_images=2)
    again = cache.find(prior__num_images=2, prior__weight=0.3, output=str(tmp_path / "o"), seed=9)
    assert again.num_reused == 2


def test_weights_of_network_and_vae_make_the_fingerprint(painter: Family) -> None:
    family = load_family(ModelConfig(path="mini-sd3", device="cpu"))
    before = fingerprint_painter(family)
    assert before == fingerprint_painter(painter)
    for module in (family.network, family.vae):
        weight = next(module.parameters())
        weight.view(-1)[0] += 1
        assert fingerprint_painter(family) != before
        before = fingerprint_painter(family)


def test_text_encoders_show_in_what_they_make_of_the_prompts(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cache.find(prior__num_images=1)
    encode = cache.family.encode_negative

    def otherwise() -> PromptEmbeddings:
        negative = encode()
        return replace(negative, tokens=negative.tokens + 1)

    monkeypatch.setattr(cache.family, "encode_negative", otherwise)
    second = cache.find(prior__num_images=1)
    assert second.num_reused == 0
    assert bytes_of(second) != bytes_of(first)


def test_a_signal_ends_the_drawing_and_what_is_finished_is_kept(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Sampler.draw

    def signalled(sampler: Sampler, seeds: list[int]) -> object:
        if seeds[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(sampler, seeds)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "draw", signalled)
        with (
            pytest.raises(Interrupted, match=f"SIGTERM: {IMAGES_KEPT}"),
            Interruption(quiet=True) as interruption,
            interruption.at_once("outside"),
            interruption.at_once(IMAGES_KEPT),
        ):
            cache.find()
    cache.batches.clear()
    assert cache.find().num_reused == 2
    assert cache.batches == [[2, 3], [4, 5]]


def in_fork(function: Callable[[], int]) -> int:
    """Start a process that ends with what the function returns."""
    process = os.fork()
    if process == 0:
        code = 99
        try:
            code = function()
        finally:
            os._exit(code)
    return process


def code_of(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.parametrize(
    "at", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 2, 3, 4, 5))]
)
def test_a_run_killed_while_it_draws_leaves_nothing_half_done(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Before each of the renames: of two pictures, their manifest, and the next."""
    wanted = bytes_of(cache.find(prior__cache=str(tmp_path / "whole")))
    replace, count = os.replace, iter(range(100))

    def killed() -> int:
        def until(source: Path, target: Path) -> None:
            if next(count) == at:
                os._exit(7)
            replace(source, target)

        monkeypatch.setattr(os, "replace", until)
        cache.find()
        return 0

    assert code_of(in_fork(killed)) == 7
    found = cache.find()
    # The manifest of the first batch is the third file to be renamed.
    assert found.num_reused == (2 if at >= 3 else 0)
    assert bytes_of(found) == wanted
    assert list(cache.root.rglob("*.tmp")) == []


def test_two_runs_at_once_draw_each_picture_once(cache: Cache) -> None:
    """The second waits, and says so; it then finds what the first has drawn."""

    def drawing() -> int:
        cache.batches.clear()
        images = cache.find()
        waited = "waiting for another run" in cache.said()
        return len(images.pictures) * 10 + len(cache.batches) + (5 if waited else 0)

    codes = sorted(code_of(process) for process in [in_fork(drawing), in_fork(drawing)])
    # One has drawn three batches; the other none, and waited unless it came when all was over.
    assert codes in ([53, 55], [50, 53])
    assert cache.find().num_reused == COUNT


def test_a_cache_that_cannot_be_written_is_named(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{PRIOR}.cache: .*/file/.* cannot be written .*choose"):
        cache.find(prior__cache=str(tmp_path / "file"))


def test_a_disk_that_fills_up_keeps_what_was_drawn(cache: Cache) -> None:
    def filled() -> int:
        draw = Sampler.draw

        def full_later(sampler: Sampler, seeds: list[int]) -> object:
            if seeds[0] == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            return draw(sampler, seeds)

        Sampler.draw = full_later
        try:
            cache.find()
        except UserError as error:
            return 7 if "000002.png: cannot be written (" in str(error) else 8
        return 0

    assert code_of(in_fork(filled)) == 7
    assert list(cache.root.rglob("*.tmp")) == []
    assert (cache.find().num_reused, cache.batches) == (2, [[2, 3], [4, 5]])
