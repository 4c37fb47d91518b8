"""Views drawn anew during training: which photo's, when, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from fastppt.config import ModelConfig, PhotosConfig, PromptsConfig, RunConfig
from fastppt.data.buckets import Bucket, bucket_sizes, encode_buckets, nearest_size
from fastppt.data.latents import encode_picture
from fastppt.data.photos import crop_photo, find_photos
from fastppt.data.refresh import ViewRefresh
from fastppt.data.views import draw_views
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.outputs.lora_files import DIFFUSERS_FILE
from fastppt.training.loop import train
from fastppt.training.result import RunResult

MakeConfig = Callable[..., RunConfig]
SEED = 11
# A step that does not divide the number of views, and is not divided by it.
SETTINGS = PhotosConfig(views=3, refresh_every=4)
ADAPTIVE = {"stage.0.objectives.denoising.weighting": "adaptive"}


@pytest.fixture
def three_photos(photos: Path, tmp_path: Path) -> Path:
    """Two square photos and, between them, one that lies."""
    folder = tmp_path / "three"
    folder.mkdir()
    for number, path in enumerate(sorted(photos.glob("*"))[:3]):
        size = (96, 64) if number == 1 else (72, 72)
        Image.open(path).convert("RGB").resize(size).save(folder / f"{number}.png")
    return folder


def encoded(family: Family, folder: Path, settings: PhotosConfig = SETTINGS) -> list[Bucket]:
    found = find_photos(folder)
    sizes = [nearest_size(photo, bucket_sizes(64, 16)) for photo in found]
    views = [draw_views(settings, SEED, number, 0) for number in range(len(found))]
    return encode_buckets(family, PromptsConfig(class_noun="robot"), found, sizes, views)


def banks(buckets: list[Bucket]) -> dict[int, Tensor]:
    """What is in the banks now, by photo."""
    return {
        number: bucket.latents.posteriors[row].clone()
        for bucket in buckets
        for row, number in enumerate(bucket.photos)
    }


def views_of(family: Family, bucket: Bucket, number: int, generation: int) -> Tensor:
    """What a photo's views should be, encoded on the spot."""
    pixels = crop_photo(bucket.photos[number], bucket.size).pixels
    views = draw_views(SETTINGS, SEED, number, generation)
    return torch.stack([encode_picture(family, pixels, view) for view in views])


def test_the_first_views_are_those_of_each_photo_by_its_number(
    family: Family, three_photos: Path
) -> None:
    for bucket in encoded(family, three_photos):
        for row, number in enumerate(bucket.photos):
            wanted = views_of(family, bucket, number, 0)
            assert torch.equal(bucket.latents.posteriors[row, 1:], wanted)


def test_a_refresh_changes_one_photo_at_the_promised_step_and_nothing_else(
    family: Family, three_photos: Path
) -> None:
    buckets = encoded(family, three_photos)
    home = {number: bucket for bucket in buckets for number in bucket.photos}
    assert [list(bucket.photos) for bucket in buckets] == [[0, 2], [1]]
    prompts = [bucket.prompts.sizes.clone() for bucket in buckets]
    addresses = [bucket.latents.posteriors.data_ptr() for bucket in buckets]
    refresh = ViewRefresh(family, SETTINGS, SEED, buckets, num_steps=100)
    before = banks(buckets)
    for step in range(17):
        refresh.before_step()
        after = banks(buckets)
        changed = [number for number in after if not torch.equal(after[number], before[number])]
        # Begun before steps 0, 4, 8, 12; seen from steps 4, 8, 12, 16 on; photo after photo.
        wanted = {4: [0], 8: [1], 12: [2], 16: [0]}.get(step, [])
        assert changed == wanted, step
        for number in changed:
            assert torch.equal(after[number][0], before[number][0])
            generation = 2 if step == 16 else 1
            wanted_views = views_of(family, home[number], number, generation)
            assert torch.equal(after[number][1:], wanted_views)
        before = after
    assert all(
        torch.equal(bucket.prompts.sizes, sizes)
        for bucket, sizes in zip(buckets, prompts, strict=True)
    )
    assert addresses == [bucket.latents.posteriors.data_ptr() for bucket in buckets]


@pytest.mark.parametrize(
    "every", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_a_refresh_that_starts_at_any_step_goes_on_as_if_it_had_been_there(
    family: Family, three_photos: Path, every: int
) -> None:
    settings, num_steps = SETTINGS.model_copy(update={"refresh_every": every}), 18
    whole = encoded(family, three_photos, settings)
    refresh = ViewRefresh(family, settings, SEED, whole, num_steps)
    history = [banks(whole)]
    for _ in range(num_steps):
        refresh.before_step()
        history.append(banks(whole))
    for start in range(0, num_steps + 1, 1 if every == 4 else 5):
        buckets = encoded(family, three_photos, settings)
        refresh = ViewRefresh(family, settings, SEED, buckets, num_steps)
        refresh.start_at(start)
        assert same(banks(buckets), history[start]), start
        for step in range(start, min(start + 5, num_steps)):
            refresh.before_step()
            assert same(banks(buckets), history[step + 1]), (start, step)


def same(first: dict[int, Tensor], second: dict[int, Tensor]) -> bool:
    return all(torch.equal(first[number], second[number]) for number in first | second)


@pytest.mark.parametrize(("every", "counts"), [(4, [0, 1, 1, 1]), (1, [3]), (2, [1, 2])])
def test_encoding_is_spread_evenly_over_the_steps(
    family: Family, three_photos: Path, monkeypatch: pytest.MonkeyPatch, every: int, counts: list
) -> None:
    settings = SETTINGS.model_copy(update={"refresh_every": every})
    buckets = encoded(family, three_photos)
    refresh = ViewRefresh(family, settings, SEED, buckets, num_steps=100)
    calls = count_encodings(monkeypatch, family)
    seen = []
    for _ in range(3 * every):
        refresh.before_step()
        seen.append(len(calls))
        calls.clear()
    assert seen == counts * 3


def test_a_refresh_that_no_step_would_see_is_left_out(
    family: Family, three_photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for num_steps, num_refreshes in ((4, 0), (5, 1), (8, 1), (9, 2)):
        buckets = encoded(family, three_photos)
        refresh = ViewRefresh(family, SETTINGS, SEED, buckets, num_steps)
        first = banks(buckets)
        with monkeypatch.context() as patch:
            calls = count_encodings(patch, family)
            for _ in range(num_steps):
                refresh.before_step()
        last = banks(buckets)
        changed = sum(not torch.equal(last[number], first[number]) for number in first)
        assert changed == num_refreshes and len(calls) == 3 * num_refreshes


def count_encodings(monkeypatch: pytest.MonkeyPatch, family: Family) -> list[None]:
    calls: list[None] = []
    encode_photos = family.encode_photos
    monkeypatch.setattr(
        family, "encode_photos", lambda pixels: (calls.append(None), encode_photos(pixels))[1]
    )
    return calls


def train_run(config: RunConfig) -> RunResult:
    return train(config, Console(quiet=True), overwrite=True)


def ups(result: RunResult) -> Tensor:
    """All up-projections of a run in one vector: they start at zero, so this is the drift."""
    tensors = load_file(result.folder.root / DIFFUSERS_FILE)
    return torch.cat([tensors[key].flatten() for key in sorted(tensors) if "lora_B" in key])


# One indicator that rises fast but stays below 1, where samples would have no weight.
AUGMENTING = ADAPTIVE | {
    "stage.0.objectives.denoising.max_augmentation": 1.0,
    "stage.0.objectives.denoising.temperature": 10.0,
    "stage.0.objectives.denoising.bins": 1,
    "stage.0.steps": 10,
    "stage.0.batch_size": 2,
    "stage.0.trainables.lora.learning_rate": 2e-2,
    "photos.views": 2,
}


@pytest.mark.slow
def test_a_refreshed_run_equals_itself_and_not_one_with_the_first_views(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    refreshed, again, kept = (
        ups(train_run(make_config(output=str(tmp_path / name), **AUGMENTING | changes)))
        for name, changes in {
            "refreshed": {"photos.refresh_every": 1},
            "again": {"photos.refresh_every": 1},
            "kept": {},
        }.items()
    )
    assert torch.equal(refreshed, again)
    assert not torch.equal(refreshed, kept)


def test_a_run_counts_the_steps_that_augment_over_all_stages(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []
    taken: list[None] = []
    build, before_step = ViewRefresh.__init__, ViewRefresh.before_step

    def spy_on_build(self: ViewRefresh, *args: object) -> None:
        built.append(args[-1])
        build(self, *args)

    def spy_on_step(self: ViewRefresh) -> None:
        taken.append(None)
        before_step(self)

    monkeypatch.setattr(ViewRefresh, "__init__", spy_on_build)
    monkeypatch.setattr(ViewRefresh, "before_step", spy_on_step)
    config = make_config(**AUGMENTING | {"photos.refresh_every": 2, "stage.0.steps": 3})
    plain = make_config(**{"stage.0.steps": 2}).stage[0]
    stages = [config.stage[0], plain, config.stage[0]]
    train_run(config.model_copy(update={"stage": stages}))
    assert built == [6] and len(taken) == 6


def test_refreshing_what_no_stage_draws_is_refused(make_config: MakeConfig) -> None:
    for changes in ({}, ADAPTIVE | {"stage.0.objectives.denoising.max_augmentation": 0.0}):
        with pytest.raises(UserError, match=r"photos.refresh_every: no stage draws augmented"):
            make_config(**changes, **{"photos.refresh_every": 3})
    make_config(**ADAPTIVE, **{"photos.refresh_every": 3})


def test_the_vae_stays_where_it_refreshes(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastppt.families.pipeline import PipelineFamily

    kept: list[bool] = []
    monkeypatch.setattr(
        PipelineFamily, "release_encoders", lambda self, *, keep_vae, **_: kept.append(keep_vae)
    )
    train_run(make_config(**AUGMENTING | {"stage.0.steps": 1}))
    refreshed = AUGMENTING | {"stage.0.steps": 3, "photos.refresh_every": 1}
    train_run(make_config(**refreshed))
    assert kept == [False, True]


class FakeStream:
    """Notes who waits for whom."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    def wait_stream(self, other: FakeStream) -> None:
        self.events.append(f"{self.name} waits for {other.name}")


def test_either_stream_waits_before_it_touches_what_the_other_has_written(
    family: Family, three_photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order in which work is queued; that a GPU keeps to it is tested on a GPU."""
    events: list[str] = []
    main, side = FakeStream("main", events), FakeStream("side", events)
    current = [main]

    @contextmanager
    def on_stream(stream: FakeStream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    settings = SETTINGS.model_copy(update={"refresh_every": 1, "views": 1})
    buckets = encoded(family, three_photos, settings)
    refresh = ViewRefresh(family, settings, SEED, buckets, num_steps=3)
    refresh._stream = side
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    encode_photos, copy_ = family.encode_photos, Tensor.copy_

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        events.append(f"encoded on {current[-1].name}")
        return encode_photos(pixels)

    def copy(self: Tensor, source: Tensor) -> Tensor:
        events.append(f"copied on {current[-1].name}")
        return copy_(self, source)

    monkeypatch.setattr(family, "encode_photos", encode)
    monkeypatch.setattr(Tensor, "copy_", copy)
    for _ in range(3):
        refresh.before_step()
    begin = ["side waits for main", "encoded on side", "copied on side"]
    take_in = ["main waits for side", "copied on main"]
    assert events == [*begin, *take_in, *begin, *take_in]


gpu = pytest.mark.gpu
CYCLES = 200_000_000
"""About a tenth of a second of a GPU."""


@pytest.fixture
def family_on_gpu() -> Family:
    return load_family(ModelConfig(path="mini-sdxl", device="cuda"))


@gpu
def test_the_side_stream_gives_what_encoding_on_the_spot_gives(
    family_on_gpu: Family, three_photos: Path
) -> None:
    buckets = encoded(family_on_gpu, three_photos)
    home = {number: bucket for bucket in buckets for number in bucket.photos}
    refresh = ViewRefresh(family_on_gpu, SETTINGS, SEED, buckets, num_steps=100)
    for _ in range(13):
        refresh.before_step()
    for number, bank in banks(buckets).items():
        wanted = views_of(family_on_gpu, home[number], number, 1)
        torch.testing.assert_close(bank[1:], wanted, rtol=1e-4, atol=1e-5)


@gpu
@pytest.mark.parametrize("late", ["encoding", "steps"])
def test_a_step_sees_all_of_the_new_views_or_none(
    family_on_gpu: Family, three_photos: Path, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    """Whichever stream is behind, what the steps' stream reads is what the step number says."""
    family = family_on_gpu
    buckets = encoded(family, three_photos)
    home = {number: bucket for bucket in buckets for number in bucket.photos}
    wanted = {number: views_of(family, home[number], number, 1) for number in home}
    first = banks(buckets)
    settings = SETTINGS.model_copy(update={"refresh_every": 1})
    refresh = ViewRefresh(family, settings, SEED, buckets, num_steps=100)
    if late == "encoding":
        encode_photos = family.encode_photos

        def encode_late(pixels: Tensor) -> tuple[Tensor, Tensor]:
            torch.cuda._sleep(CYCLES)
            return encode_photos(pixels)

        monkeypatch.setattr(family, "encode_photos", encode_late)
    seen = []
    for _ in range(4):
        refresh.before_step()
        if late == "steps":
            torch.cuda._sleep(CYCLES)
        seen.append(banks(buckets))
    for step, bank in enumerate(seen):
        for number in home:
            expected = wanted[number] if number < step else first[number][1:]
            torch.testing.assert_close(bank[number][1:], expected, rtol=1e-4, atol=1e-5)


@gpu
def test_a_refresh_does_not_make_the_host_wait(family_on_gpu: Family, three_photos: Path) -> None:
    buckets = encoded(family_on_gpu, three_photos)
    refresh = ViewRefresh(family_on_gpu, SETTINGS, SEED, buckets, num_steps=100)
    for _ in range(5):
        refresh.before_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(9):
            refresh.before_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_a_replayed_graph_reads_the_new_views(family_on_gpu: Family, three_photos: Path) -> None:
    family = family_on_gpu
    buckets = encoded(family, three_photos)
    bank = buckets[0].latents.posteriors
    seen = torch.empty_like(bank)
    seen.copy_(bank)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seen.copy_(bank)
    settings = SETTINGS.model_copy(update={"refresh_every": 1})
    refresh = ViewRefresh(family, settings, SEED, buckets, num_steps=100)
    copies = []
    for _ in range(3):
        refresh.before_step()
        graph.replay()
        copies.append(seen.clone())
    first = views_of(family, buckets[0], 0, 1)
    assert not torch.allclose(copies[0][0, 1:], first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copies[1][0, 1:], first, rtol=1e-4, atol=1e-5)
    assert torch.equal(copies[1], copies[2])
