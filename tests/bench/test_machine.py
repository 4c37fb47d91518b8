import json

import pytest

from bench import machine

WANTED = {"cpu", "gpu", "driver", "torch", "triton", "diffusers", "python", "commit", "date"}


def test_machine_record_names_what_a_result_depends_on():
    record = machine.describe_machine("cpu")
    assert WANTED | {"threads", "load", "device", "uncommitted changes"} <= record.keys()
    assert record["cpu"]
    assert record["gpu"] is None
    assert json.loads(json.dumps(record)) == record


def test_machine_record_does_without_git_and_without_a_package(monkeypatch):
    monkeypatch.setenv("PATH", "")
    record = machine.describe_machine("cpu")
    assert record["commit"] is None
    assert record["uncommitted changes"] is None
    assert machine._version("no-such-distribution") is None


def test_copy_bandwidth_counts_bytes_read_and_written(monkeypatch):
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 4_000_000)
    monkeypatch.setattr(machine, "stopwatch_of", lambda device: lambda call: 2.0)
    # 4 MB read and 4 MB written in 2 ms.
    assert machine.copy_bandwidth("cpu") == pytest.approx(4.0)
