"""What is found out about the machine, and that finding out never hangs."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from fastppt import machine
from fastppt.machine import disk, free_host_memory, gpus, hub, size_in_words


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_offline_hub_is_named_with_its_cache() -> None:
    finding = hub()
    assert finding.level == "note"
    assert "HF_HUB_OFFLINE is set" in finding.text and constants.HF_HUB_CACHE in finding.text


def test_hub_that_answers_is_reachable_whatever_it_says(
    online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NotFound(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub().level == "ok"


def test_hub_that_is_not_there_or_says_nothing_is_not_waited_for(
    online: None, monkeypatch: pytest.MonkeyPatch, listening: socket.socket
) -> None:
    monkeypatch.setattr(machine, "HUB_SECONDS", 0.3)
    port = listening.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    start = time.monotonic()
    finding = hub()
    assert finding.level == "note" and "does not answer" in finding.text
    # Not a measurement: without a limit this would wait for ever.
    assert time.monotonic() - start < 60


def test_free_memory_is_below_the_limit_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_text
    gib = 2**30
    texts = {
        "/proc/meminfo": f"MemTotal: 999 kB\nMemAvailable:   {8 * 2**20} kB\n",
        "/sys/fs/cgroup/memory.max": f"{4 * gib}\n",
        "/sys/fs/cgroup/memory.current": f"{3 * gib}\n",
        "/sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {gib}\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda path: texts.get(str(path)) or real(path))
    assert free_host_memory() == 2 * gib
    texts["/sys/fs/cgroup/memory.max"] = "max\n"
    assert free_host_memory() == 8 * gib
    texts["/sys/fs/cgroup/memory.max"] = f"{99 * gib}\n"
    assert free_host_memory() == 8 * gib


def test_disk_is_that_of_the_output_before_it_exists(tmp_path: Path) -> None:
    finding = disk(tmp_path / "new" / "run")
    assert finding.level == "ok" and finding.text.endswith(f" GiB free at {tmp_path}")
    assert str(Path.cwd()) in disk(None).text


def test_sizes_are_in_words() -> None:
    assert size_in_words(3 * 2**29) == "1.5 GiB"
    assert size_in_words(2**19) == "0.5 MiB"


def test_driver_without_a_gpu_for_torch_asks_for_another_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = gpus()
    assert finding.level == "note" and finding.text.startswith("none: torch ")
    program.write_text("#!/bin/sh\necho 580.65.06\n")
    program.chmod(0o755)
    (finding,) = gpus()
    assert finding.level == "note"
    assert finding.text.startswith("driver 580.65.06 is here, but torch sees no GPU: ")
    assert finding.text.endswith("install a torch built for your GPU")


def test_peak_host_memory_is_the_most_there_was() -> None:
    code = (
        "from fastppt.machine import peak_host_memory as peak\n"
        "before = peak(); data = b'1' * 2**26; grown = peak(); del data\n"
        "print(before, grown, peak())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, grown, after = map(int, run.stdout.split())
    assert 2**20 < before < 2**28
    assert grown - before == pytest.approx(2**26, rel=0.1)
    assert after > grown - 2**20


def test_gpu_that_does_not_work_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(index: int) -> None:
        raise RuntimeError("CUDA error: device unavailable\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    (finding,) = gpus()
    assert finding.level == "problem"
    assert finding.text == "does not work: CUDA error: device unavailable"


@pytest.mark.gpu
def test_gpu_is_described() -> None:
    finding = gpus()[0]
    assert finding.level == "ok"
    assert torch.cuda.get_device_name(0) in finding.text
    assert "compute capability" in finding.text and "GiB free" in finding.text
