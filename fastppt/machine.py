"""What this machine is: GPUs, memory, disk, and the way to the hub.

Nothing that can be missing or broken is imported at the top.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HUB_SECONDS = 5.0
"""How long to wait for the hub before calling it unreachable."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: `problem` keeps a training from starting, `note` is worth knowing.
        what: What was looked at.
        text: What was found, and what to do about it.
    """

    level: Literal["ok", "note", "problem"]
    what: str
    text: str


def gpus() -> list[Finding]:
    """Return each GPU that torch sees; or why it sees none, and whether the driver is there."""
    import torch

    driver = _nvidia_driver()
    build = "for the CPU alone"
    if torch.version.cuda is not None:
        build = f"for CUDA {torch.version.cuda}"
    elif torch.version.hip is not None:
        build = f"for ROCm {torch.version.hip}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        reasons = [f"torch {torch.__version__} is built {build}"]
        reasons += [" ".join(str(warning.message).split()) for warning in caught]
        if driver is None:
            return [Finding("note", "GPU", f"none: {'; '.join(reasons)}; the CPU will train")]
        text = f"driver {driver} is here, but torch sees no GPU: {'; '.join(reasons)}; "
        return [Finding("note", "GPU", text + "install a torch built for your GPU")]
    return [_gpu(index, build, driver) for index in range(count)]


def host_memory() -> Finding:
    """Return the free memory of the machine."""
    return Finding("ok", "memory", f"{size_in_words(free_host_memory())} free")


def free_host_memory() -> int:
    """Return how many bytes of memory this process may still take.

    The least of what the kernel calls available and what the container's limit (cgroup v2) leaves.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        statistics = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 1024 * int(kib)
    if limit == "max":
        return 1024 * int(kib)
    # Pages of files count as used and are given up first.
    cached = next(line.split()[1] for line in statistics if line.startswith("inactive_file "))
    return min(1024 * int(kib), int(limit) - used + int(cached))


def peak_host_memory() -> int:
    """Return the most bytes of memory that this process has had since it began.

    The kernel keeps that number (the resident set's high-water mark), and it never goes down: it
    says nothing of a part of a run.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


def disk(output: Path | None) -> Finding:
    """Return the free disk space where the output goes, or in the current folder."""
    folder = nearest_folder(output or Path.cwd())
    return Finding(
        "ok", "disk", f"{size_in_words(shutil.disk_usage(folder).free)} free at {folder}"
    )


def nearest_folder(path: Path) -> Path:
    """Return the folder, or the nearest above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.is_dir())


def hub() -> Finding:
    """Return whether models can be downloaded; waits `HUB_SECONDS` at most."""
    from huggingface_hub import constants

    cached = f"the cache is {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return Finding("note", "hub", f"offline (HF_HUB_OFFLINE is set); {cached}")
    reached = threading.Event()

    def knock() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=HUB_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # An answer.
        except OSError:
            return
        reached.set()

    # In a thread, for the name server may take longer than any timeout of the connection.
    threading.Thread(target=knock, daemon=True).start()
    if reached.wait(HUB_SECONDS):
        return Finding("ok", "hub", f"{constants.ENDPOINT} answers; {cached}")
    text = f"{constants.ENDPOINT} does not answer: only models on this machine can be used"
    return Finding("note", "hub", f"{text}; {cached}")


def size_in_words(num_bytes: int) -> str:
    """Return a number of bytes in MiB or GiB."""
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**30:.1f} GiB"


def _gpu(index: int, build: str, driver: str | None) -> Finding:
    import torch

    try:
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        return Finding("problem", f"GPU {index}", f"does not work: {str(error).splitlines()[0]}")
    text = (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{size_in_words(free)} of {size_in_words(total)} free; torch is built {build}"
    )
    return Finding("ok", f"GPU {index}", text if driver is None else f"{text}, driver {driver}")


def _nvidia_driver() -> str | None:
    """Return the version of NVIDIA's driver as nvidia-smi says; None if there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.split("\n")[0].strip() or None
