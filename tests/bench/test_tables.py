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
ALIGNMENT = CPU | {
    "rows": [
        {"suite": suite, "form": "float32", "workload": work, "way": way}
        | {"p50 ms": ms, "times ours": ms / 10}
        for suite, work, way, ms in [
            ("joint attention", "SD3-M", "joint_attention", 10.0),
            ("joint attention", "SD3-M", "materialised maps", 34.0),
            ("feature alignment", "SDXL", "feature_alignment_loss", 10.0),
            ("feature alignment", "SDXL", "var_mean", 9.0),
            ("feature alignment", "SDXL", "mean, mean of squares", 11.0),
        ]
    ]
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
    blocks = ["{}\nold\n{}\n".format(*tables.markers(name)) for name in tables.BLOCKS]
    path.write_text("\n".join(["# it\n", *blocks, "after\n"]))
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
    assert text.count("not measured yet") == 9
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


def test_each_regulariser_has_a_line_with_all_that_was_timed(readme):
    text = write(readme, cpu_alignment_2030_01_02=ALIGNMENT)
    assert "| joint attention, float32: SD3-M | 10.0 | materialised maps 34.0 (3.4x) |" in text
    others = "var_mean 9.0 (0.9x), mean, mean of squares 11.0 (1.1x)"
    assert f"| feature alignment, float32: SDXL | 10.0 | {others} |" in text
    assert text.count("A CPU, 1 thread") == 1


def step_row(model, resolution, way, milliseconds, **more):
    labels = {"suite": "step", "model": model, "resolution": resolution, "batch": 1, "rank": 32}
    return labels | {"way": way, "p50 ms": milliseconds, "times ours": milliseconds / 100} | more


def test_steps_on_the_cpu_have_a_column_for_each_size(readme):
    rows = [
        step_row("mini-sdxl", 64, "lora, eager", 100.0),
        step_row("mini-sdxl", 64, "diffusers-style, eager", 140.0),
        step_row("mini-sdxl", 128, "lora, eager", 300.0),
    ]
    text = write(readme, cpu_step_2030_01_02=CPU | {"rows": rows})
    assert "| ms, median | mini-sdxl, 64 px, batch 1 | mini-sdxl, 128 px, batch 1 |" in text
    assert "| recipe `lora` | 100.0 | 300.0 |" in text
    assert "| diffusers' step | 140.0 (1.40x) | not measured |" in text


def test_steps_on_a_gpu_have_a_line_for_each_way_and_their_targets(readme):
    costs = {"kernels": 9000, "peak bytes": 12.34e9, "share of product": 0.456}
    rows = [
        step_row("sdxl", 1024, "lora, graph", 50.0, **costs),
        step_row("sdxl", 1024, "diffusers-style, eager", 150.0, **costs | {"times ours": 3.0}),
        # Of another plan.
        step_row("sdxl", 1024, "lora, graph", 60.0, **costs),
        step_row("mini-sdxl", 64, "lora, graph", 5.0, **costs),
    ]
    rows[0]["times ours"] = 1.0
    text = write(readme, gpu_a_gpu_2030_01_02=GPU | {"rows": [*GPU["rows"], *rows]})
    assert "| SDXL, 1024 px: lora, graph | 50.0 | 9000 | 12.3 GB | 46% |" in text
    assert "60.0" not in text and "mini-sdxl" not in text
    assert "in a graph: times faster than diffusers' step | 2.5 | 3.00 |" in text
    assert "in a graph: ms, at most | 55.0 | 50.00 |" in text


def test_each_option_has_a_line_with_its_cost(readme):
    labels = {"model": "mini-sdxl", "resolution": 128, "batch": 1, "rank": 32, "engine": "eager"}
    rows = [
        labels | {"way": "recipe `lora`", "p50 ms": 100.0, "times ours": 1.0},
        labels | {"way": "`lora.targets=up`", "p50 ms": 61.26, "times ours": 0.614},
    ]
    text = write(readme, cpu_options_2030_01_02=CPU | {"rows": rows})
    assert "mini-sdxl at 128 pixels, batch 1, rank 32, engine eager (A CPU, 1 thread" in text
    assert "| `lora.targets=up` | 61.3 | 0.61 |" in text


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
    start, end = tables.markers("toy2d")
    path.write_text("{}\n{}\n".format(*tables.markers("bench")) + f"{end}\n{start}\n")
    before = path.read_text()
    with pytest.raises(SystemExit, match="want one line <!-- toy2d:start -->"):
        tables.main(["--readme", str(path), "--results", str(tmp_path)])
    assert path.read_text() == before
