"""Augmented views: where each point goes, what is outside, that nothing aliases, seed alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastppt.config import PhotosConfig
from fastppt.data.views import View, draw_views, take_view

SIZES = [(64, 64), (48, 80), (63, 41)]
WIDEST = 10.0


def noise(height: int, width: int) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def blob(height: int, width: int, x: float, y: float, radius: float = 2.5) -> Tensor:
    """A soft white dot on black, its centre (x, y) pixels right of and below the picture's."""
    ys = torch.arange(height)[:, None] + 0.5 - height / 2
    xs = torch.arange(width)[None] + 0.5 - width / 2
    dot = torch.exp(-((xs - x) ** 2 + (ys - y) ** 2) / (2 * radius**2))
    return (2 * dot - 1).expand(3, -1, -1).contiguous()


def centroid(pixels: Tensor) -> tuple[float, float]:
    """Where the light is, as in `blob`."""
    light = (pixels[0].double() + 1).clamp_min(1e-3) - 1e-3
    height, width = light.shape
    ys = torch.arange(height, dtype=torch.float64)[:, None] + 0.5 - height / 2
    xs = torch.arange(width, dtype=torch.float64)[None] + 0.5 - width / 2
    return float((light * xs).sum() / light.sum()), float((light * ys).sum() / light.sum())


@pytest.mark.parametrize("fill", ["reflect", "edge"])
@pytest.mark.parametrize("size", SIZES)
def test_scale_1_and_angle_0_are_the_photo_itself(size: tuple[int, int], fill: str) -> None:
    photo = noise(*size)
    assert torch.equal(take_view(photo, View(1.0, 0.0, fill)), photo)


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
@pytest.mark.parametrize("zoom_out", [1.0, 1.37, 2.0])
@pytest.mark.parametrize("angle", [0.0, 15.0, -90.0])
def test_a_dot_lands_where_the_matrix_says(
    size: tuple[int, int], zoom_out: float, angle: float
) -> None:
    x, y = 9.3, -6.1
    seen = take_view(blob(*size, x, y), View(zoom_out, angle, "edge"))
    turn = math.radians(angle)
    # Counter-clockwise as one looks at it, with y downwards: what is right goes up.
    wanted = (
        (x * math.cos(turn) + y * math.sin(turn)) / zoom_out,
        (-x * math.sin(turn) + y * math.cos(turn)) / zoom_out,
    )
    assert centroid(seen) == pytest.approx(wanted, abs=0.05)


def test_what_is_right_goes_up_when_turned_by_90_degrees() -> None:
    photo = noise(32, 32)
    turned = take_view(photo, View(1.0, 90.0, "edge"))
    torch.testing.assert_close(turned, photo.rot90(1, (1, 2)), rtol=0, atol=1e-6)


def test_zoom_out_2_halves() -> None:
    height = width = 64
    seen = take_view(blob(height, width, 0, 0, radius=8), View(2.0, 0.0, "edge"))
    torch.testing.assert_close(seen, blob(height, width, 0, 0, radius=4), rtol=0, atol=0.02)


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_the_outside_is_the_mirror_image_or_the_edge(size: tuple[int, int]) -> None:
    height, width = size
    # A slope from left to right, steep enough to tell places apart.
    photo = torch.linspace(-1, 1, width).expand(3, height, width).contiguous()
    middle = slice(width // 4, 3 * width // 4)
    reflected = take_view(photo, View(2.0, 0.0, "reflect"))
    inside = reflected[:, :, middle]
    left, right = reflected[:, :, : width // 4], reflected[:, :, 3 * width // 4 :]
    torch.testing.assert_close(left, inside[..., : width // 4].flip(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(right, inside[..., width // 4 :].flip(2), rtol=0, atol=1e-6)
    drawn_out = take_view(photo, View(2.0, 0.0, "edge"))
    # Two pixels beside the seam still mix with the inside.
    assert (drawn_out[..., : width // 4 - 2] + 1).abs().max() < 0.02
    assert (drawn_out[..., 3 * width // 4 + 2 :] - 1).abs().max() < 0.02


def test_scale_3_reflects_the_subject_nine_times() -> None:
    photo = blob(60, 60, 0, 0, radius=6)
    seen = take_view(photo, View(3.0, 0.0, "reflect"))
    tiles = seen.unflatten(1, (3, 20)).unflatten(3, (3, 20))
    torch.testing.assert_close(tiles[:, 0, :, 2], tiles[:, 1, :, 1], rtol=0, atol=1e-5)
    assert (take_view(photo, View(3.0, 0.0, "edge")) > 0).sum() * 9 == (seen > 0).sum()


@pytest.mark.parametrize("angle", [0.0, 11.0])
@pytest.mark.parametrize("zoom_out", [2.0, 2.7, 3.0])
def test_a_checkerboard_comes_out_grey(zoom_out: float, angle: float) -> None:
    ys, xs = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    photo = (2.0 * ((ys + xs) % 2) - 1).expand(3, -1, -1)
    seen = take_view(photo, View(zoom_out, angle, "reflect"))
    # The mirror's seams have their own pattern: look at the photo itself.
    inside = seen[:, 36:60, 36:60]
    assert inside.abs().max() < 0.05


def test_views_stay_within_range_and_dtype() -> None:
    seen = take_view(noise(64, 64).sign(), View(1.3, 7.0, "reflect"))
    assert seen.dtype == torch.float32 and seen.shape == (3, 64, 64)
    assert seen.abs().max() == 1


def test_taking_a_view_leaves_the_photo_alone() -> None:
    photo = noise(32, 32)
    before = photo.clone()
    take_view(photo, View(2.0, 10.0, "reflect"))
    assert torch.equal(photo, before)


def test_views_follow_from_seed_photo_and_generation_alone() -> None:
    settings = PhotosConfig(views=6)
    views = draw_views(settings, 5, 2, 0)
    torch.manual_seed(1)
    assert draw_views(settings, 5, 2, 0) == views
    for seed, photo, generation in ((6, 2, 0), (5, 3, 0), (5, 2, 1)):
        assert not set(views) & set(draw_views(settings, seed, photo, generation))
    fewer = PhotosConfig(views=4)
    assert draw_views(fewer, 5, 2, 0) == views[:4]


def test_views_are_drawn_evenly_over_what_is_allowed() -> None:
    settings = PhotosConfig(views=4000, max_zoom_out=2.0, max_rotation=30.0, fill="edge")
    views = draw_views(settings, 0, 0, 0)
    assert {view.fill for view in views} == {"edge"}
    for values, low, high in (
        ([view.zoom_out for view in views], 1.0, 2.0),
        ([view.angle for view in views], -30.0, 30.0),
    ):
        shares = torch.histc(torch.tensor(values), bins=4, min=low, max=high) / len(values)
        assert low <= min(values) and max(values) <= high
        assert (shares - 0.25).abs().max() < 0.03


def test_views_that_may_not_differ_are_the_photo() -> None:
    settings = PhotosConfig(views=2, max_zoom_out=1.0, max_rotation=0.0)
    photo = noise(16, 16)
    for view in draw_views(settings, 0, 0, 0):
        assert torch.equal(take_view(photo, view), photo)


@pytest.mark.gpu
def test_views_agree_on_cpu_and_gpu() -> None:
    photo = noise(48, 80)
    for view in draw_views(PhotosConfig(views=4), 0, 0, 0):
        on_gpu = take_view(photo.cuda(), view)
        torch.testing.assert_close(on_gpu.cpu(), take_view(photo, view), rtol=0, atol=1e-6)


def test_nothing_wider_than_the_widest_view_is_taken() -> None:
    PhotosConfig(max_zoom_out=WIDEST)
    with pytest.raises(ValueError, match="less than or equal to 10"):
        PhotosConfig(max_zoom_out=WIDEST + 0.01)
    assert take_view(noise(8, 8), View(WIDEST, 15.0, "reflect")).isfinite().all()


@pytest.mark.gpu
def test_the_widest_view_fits_a_gpu() -> None:
    photo = noise(1024, 1024).cuda()
    seen = take_view(photo, View(WIDEST, 15.0, "reflect"))
    assert seen.isfinite().all()
