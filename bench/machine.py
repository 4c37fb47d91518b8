"""What a result was measured on, and how fast that machine copies memory."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from bench import ROOT
from bench.interleave import stopwatch_of, summarise

# Past the largest caches; the GPU's is larger, for a copy of it must last past launch overhead.
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
COPY_ROUNDS = 15


def describe_machine(device: str = "cpu") -> dict[str, object]:
    """Return the machine, the versions and the commit, of which JSON can be made."""
    on_gpu = device == "cuda"
    return {
        "device": device,
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        # Of the last minute: how quiet the machine was.
        "load": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if on_gpu
        else None,
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "diffusers": _version("diffusers"),
        "transformers": _version("transformers"),
        "peft": _version("peft"),
        "commit": _run("git", "rev-parse", "HEAD"),
        "uncommitted changes": _has_changes(),
        "date": datetime.date.today().isoformat(),
    }


def copy_bandwidth(device: str = "cpu") -> float:
    """Return the GB/s of a large copy, bytes read and bytes written both counted."""
    num_bytes = COPY_BYTES[device]
    source = torch.rand(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    stopwatch = stopwatch_of(device)
    for _ in range(2):
        target.copy_(source)
    times = [stopwatch(lambda: target.copy_(source)) for _ in range(COPY_ROUNDS)]
    return 2 * num_bytes / summarise(times).p50 / 1e6


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(*command: str) -> str | None:
    """Return what the command prints, None where it cannot be run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _has_changes() -> bool | None:
    changes = _run("git", "status", "--porcelain")
    return None if changes is None else bool(changes)
