import json

import pytest

from bench import cpu
from bench.suites import ADAPTIVE_DENOISING, ANCHOR, Workload, list_workload

SMALL = {"anchor": Workload("small", [(3, 63), (130, 3)])}
SMALL |= {"alignment": Workload("small", [(2, 4, 6, 5)])}


@pytest.fixture
def small(monkeypatch):
    suites = {"anchor": [(ANCHOR, "anchor")], "alignment": [(ADAPTIVE_DENOISING, "alignment")]}
    monkeypatch.setattr(cpu, "SUITES", suites)
    monkeypatch.setattr(cpu, "list_workload", SMALL.__getitem__)
    monkeypatch.setattr(cpu, "copy_bandwidth", lambda device: 10.0)


@pytest.mark.parametrize(
    ("options", "suite"),
    [([], "anchor"), (["--suite", "alignment"], "adaptive denoising")],
)
def test_a_suite_leaves_a_file_of_its_name(small, tmp_path, options, suite):
    cpu.main(["--out", str(tmp_path), "--seconds", "0.01", *options])
    (path,) = tmp_path.iterdir()
    report = json.loads(path.read_text())
    name = options[-1] if options else "anchor"
    assert path.name == f"cpu-{name}-{report['machine']['date']}.json"
    assert {row["suite"] for row in report["rows"]} == {suite}
    assert bool(report["targets"]) == (name == "anchor")
    assert report["machine"]["threads"] == 1


def test_an_unknown_suite_is_named_with_those_there_are(capsys, tmp_path):
    with pytest.raises(SystemExit):
        cpu.main(["--out", str(tmp_path), "--suite", "anchors"])
    assert "anchors" in (shown := capsys.readouterr().err) and "alignment" in shown


def test_all_suites_name_workloads_that_exist():
    for works in cpu.SUITES.values():
        for suite, workload in works:
            assert list_workload(workload).name == workload
            assert suite.ways(compiled=False)
