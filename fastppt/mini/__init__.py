"""The embedded small model: a whole SDXL in structure, small enough for one CPU thread.

Nothing is downloaded. `build_mini_sdxl` makes a real diffusers pipeline of random weights, and
`draw_demo_photos` draws five photos of one subject to train it on.
"""

from typing import TYPE_CHECKING, Any

from fastppt.mini.photos import draw_demo_photos

if TYPE_CHECKING:
    from fastppt.mini.sdxl import build_mini_sdxl

__all__ = ["build_mini_sdxl", "draw_demo_photos"]


def __getattr__(name: str) -> Any:
    """Import the model on first use: diffusers takes seconds, and the photos do not need it."""
    if name == "build_mini_sdxl":
        from fastppt.mini.sdxl import build_mini_sdxl

        return build_mini_sdxl
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
