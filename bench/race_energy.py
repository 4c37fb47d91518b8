"""The energy that a GPU takes, as NVML counts it."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

JOULES_A_UNIT = 1e-3


class EnergyMeter:
    """A GPU's counter of energy, of the whole card, since its driver was loaded.

    Args:
        nvml: The module `pynvml` of the package `nvidia-ml-py`, initialised.
        handle: NVML's of the card.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def read(self) -> float:
        """Return joules. The card brings its counter up to date some ten times a second."""
        return JOULES_A_UNIT * float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))


def open_meter(device: str) -> EnergyMeter | None:
    """Return the meter of torch's current GPU.

    Args:
        device: "cpu" or "cuda".

    Returns:
        None on the CPU, without the package `nvidia-ml-py`, and where the card or its driver
        counts no energy.
    """
    if device == "cpu" or importlib.util.find_spec("pynvml") is None:
        return None
    nvml = importlib.import_module("pynvml")
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    try:
        nvml.nvmlInit()
        meter = EnergyMeter(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid.encode()))
        meter.read()
    except nvml.NVMLError:
        return None
    return meter
