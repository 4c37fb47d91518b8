"""The embedded small models: whole pipelines in structure, small enough for one CPU thread.

Nothing is downloaded. `build_mini` makes a real diffusers pipeline: mini-sdxl with the weights that
the package brings along, trained on the mini world, and the others with random ones.
`draw_demo_photos` draws five photos of one subject to train it on.
"""

from typing import TYPE_CHECKING, Literal, get_args

from fastppt.mini.photos import draw_demo_photos

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["MINI_MODELS", "MiniModel", "build_mini", "draw_demo_photos"]

MiniModel = Literal["mini-sd", "mini-sdxl", "mini-sd3"]
MINI_MODELS: tuple[str, ...] = get_args(MiniModel)


def build_mini(name: str, seed: int | None = None) -> "DiffusionPipeline":
    """Build a mini model, in evaluation mode, float32, on the CPU.

    Args:
        name: One of `MINI_MODELS`.
        seed: Of random weights: the same seed gives the same pipeline, bit for bit. None is the
            trained weights of the package for mini-sdxl, and seed 0 for the others.

    Raises:
        ValueError: there is no mini model of that name.
        fastppt.errors.UserError: the trained weights are not there, or damaged.
    """
    # Imported on first use: diffusers takes seconds, and the photos do not need it.
    match name:
        case "mini-sd":
            from fastppt.mini.sd import build_mini_sd

            return build_mini_sd(seed or 0)
        case "mini-sdxl":
            from fastppt.mini.sdxl import build_mini_sdxl, load_mini_sdxl

            return load_mini_sdxl() if seed is None else build_mini_sdxl(seed)
        case "mini-sd3":
            from fastppt.mini.sd3 import build_mini_sd3

            return build_mini_sd3(seed or 0)
    raise ValueError(f"no mini model {name!r}: there are {', '.join(MINI_MODELS)}")
