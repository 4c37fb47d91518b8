"""The face towards other trainers' loops."""

from fastppt.foreign.attached import AlignmentLosses, Attached, attach
from fastppt.foreign.captured import CapturedStep
from fastppt.foreign.indicator import OverfittingIndicator
from fastppt.foreign.lora_pairs import lora_pairs

__all__ = [
    "AlignmentLosses",
    "Attached",
    "CapturedStep",
    "OverfittingIndicator",
    "attach",
    "lora_pairs",
]
