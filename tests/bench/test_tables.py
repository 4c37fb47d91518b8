import json

import pytest

from bench import tables

CPU = {
    "machine": {
        "cpu": "A CPU",
        "gpu": None,
        "threads": 1,
        "torch": "2.13.0",
        "date": "2030-01-02",
    },
    "rows": [
        {"suite": "anchor", "workload": "SDXL, rank 4", "way": way, "p50 ms": ms, "times ours": t}
        for way, ms, t in [("anchor_penalty_", 10.0, 1.0), ("autograd loop", 54.0, 5.4)]
    ],
}
GPU = {
    "machine": {
        "gpu": "A GPU",
        "driver": "580",
        "triton": "3.6.0",
        "torch": "2.11.0",
        "date": "2030-01-02",
    },
    "rows": [
        {
            "suite": "optimizer",
            "form": "raw",
            "workload": "SDXL, rank 32",
            "mode": mode,
            "way": way,
            "p50 ms": ms,
            "times ours": ms / 0.5,
            "share of copy": share,
            "extra bytes": extra,
        }
        for mode, way, ms, share, extra in [
            ("captured", "AnchoredAdamW, arena", 0.5, 0.85, 1e6),
            ("captured", "foreach + AdamW(fused), arena", 0.8, 0.53, 1e6),
            ("eager", "AnchoredAdamW, arena", 0.6, 0.7, 2e6),
        ]
    ],
}


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"# it\n\n{tables.START}\nold\n{tables.END}\n\nafter\n")
    return path


def write(readme, **reports):
    results = readme.parent / "results"
    results.mkdir()
    for name, report in reports.items():
        (results / f"{name.replace('_', '-')}.json").write_text(json.dumps(report))
    tables.main(["--readme", str(readme), "--results", str(results)])
    return readme.read_text()


def test_without_results_everything_is_not_measured(readme):
    text = write(readme)
    assert text.startswith("# it\n") and text.endswith("\n\nafter\n")
    assert "old" not in text
    assert text.count("not measured yet") == 2
    assert "| `anchor_penalty_` | not measured | not measured | not measured |" in text
    assert "share of the copy bandwidth | 0.8 | not measured |" in text


def test_rows_come_from_the_results_and_what_they_lack_is_not_measured(readme):
    text = write(readme, cpu_anchor_2030_01_02=CPU, gpu_a_gpu_2030_01_02=GPU)
    assert "(A CPU, 1 thread, torch 2.13.0, 2030-01-02)" in text
    assert "| autograd loop | not measured | 54.0 (5.4x) | not measured |" in text
    assert "(A GPU, driver 580, triton 3.6.0, torch 2.11.0, 2030-01-02)" in text
    assert "| `AnchoredAdamW`, one arena | 0.500 | 85% | 2 MB |" in text
    assert "| `AnchoredAdamW`, 1120 tensors | not measured | not measured | not measured |" in text
    assert "share of the copy bandwidth | 0.8 | 0.85 |" in text
    assert "times faster than foreach + AdamW(fused), arena | 1.3 | 1.60 |" in text


def test_the_latest_result_of_each_gpu_counts(readme):
    later = json.loads(json.dumps(GPU))
    later["machine"]["date"] = "2030-02-01"
    other = json.loads(json.dumps(GPU))
    other["machine"]["gpu"] = "Another"
    text = write(
        readme, gpu_a_gpu_2030_02_01=later, gpu_a_gpu_2030_01_02=GPU, gpu_b_2030_01_01=other
    )
    assert "2030-02-01" in text and "Another" in text
    assert text.count("captured in a CUDA graph") == 2


def test_written_again_it_is_the_same(readme):
    once = write(readme, gpu_a_gpu_2030_01_02=GPU)
    results = readme.parent / "results"
    tables.main(["--readme", str(readme), "--results", str(results)])
    assert readme.read_text() == once


def test_a_readme_without_the_markers_is_left_as_it_is(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"{tables.END}\n{tables.START}\n")
    with pytest.raises(SystemExit, match="want one line"):
        tables.main(["--readme", str(path), "--results", str(tmp_path)])
    assert path.read_text() == f"{tables.END}\n{tables.START}\n"
