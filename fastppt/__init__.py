"""Teaches a text-to-image diffusion model one subject without letting it forget the rest."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from fastppt.backend import CapturedStep, OverfittingIndicator, attach

__all__ = ["CapturedStep", "OverfittingIndicator", "__version__", "attach", "load"]
__version__ = "0.1.0"

IN_BACKEND = ("CapturedStep", "OverfittingIndicator", "attach")

Pipeline = TypeVar("Pipeline")


def load(pipe: Pipeline, run: str | Path) -> Pipeline:
    """Put what a run has trained into a stock pipeline of diffusers, whatever it trained.

    LoRA and peft's adapters are added to the pipeline's network; a network that was trained itself,
    and shifts of singular values, are written into its weights, in their dtype. A learned word is
    taught to tokenizers and text encoders. A pipeline takes one run.

    Args:
        pipe: Of the base model that the run trained, on any device and of any dtype; for shifts of
            singular values not of fewer bits than the run's. Written.
        run: Output folder of a finished run, or one of its checkpoints.

    Returns:
        The pipeline that was given.

    Raises:
        fastppt.errors.UserError: the folder is none of a run or lacks a file, or the run trained
            another model; what does not fit is named.
    """
    from fastppt.outputs.loading import load as load_run

    return load_run(pipe, Path(run))


def __getattr__(name: str) -> Any:
    """Import what other trainers' loops use when it is first asked for: diffusers takes seconds."""
    if name not in IN_BACKEND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastppt import backend

    return getattr(backend, name)
