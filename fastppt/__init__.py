"""Teaches a text-to-image diffusion model one subject without letting it forget the rest."""

__version__ = "0.1.0"
