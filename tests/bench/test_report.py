import html.parser
import json
import re
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from bench import ROOT, report, scaling_axes
from bench.race_results import write_race
from bench.report_charts import Interval, choose_ticks, draw_intervals, draw_stacks
from bench.report_html import VOID, element, join, table
from bench.report_markdown import render
from bench.report_results import KINDS, read_result, read_results
from bench.report_scaling import ABOUT_RUNS, ABOUT_SUBJECTS, RUNS, STEP
from tests.bench.report_races import (
    MACHINE,
    PEER,
    PPT_EAGER,
    make_entrant,
    make_entrants,
    make_race,
)

RESULTS = ROOT / "bench" / "results"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SCALING = {
    "kind": "scaling",
    "machine": MACHINE,
    "command": "python -m bench.scaling --axes rank --output bench/results",
    "settings": {"model": "mini-sdxl", "resolution": None, "batch_size": 1, "precision": "float32"},
    "axes": [
        {
            **{"axis": "rank", "x": "rank", "of": "a step", "drift": 0.97},
            "rows": [
                {"recipe": "ppt-lora", "label": "8", "x": 8, "peak bytes": 2e9, "flops": None}
                | {"p20 s": 0.049, "p50 s": 0.05, "p80 s": 0.052, "rounds": 33}
            ],
            "refused": [{"label": "4096", "refused": "too large"}],
            "fits": [{"recipe": "ppt-lora", "what": "seconds", "in words": "exponent 0.50"}],
            "picture": "cpu-scaling-mini-sdxl-rank-2030-01-02.png",
        },
        {
            **{"axis": "subjects", "x": "subjects", "of": "runs in turn", "drift": None},
            **{"rows": [], "refused": [], "fits": [], "picture": None},
        },
    ],
}
CEILINGS = {"product tflop/s": 0.0712, "product size": 1024, "copy gb/s": 20.0}
ROOFLINE = {
    "kind": "roofline",
    "machine": MACHINE,
    "settings": {"model": "mini-sdxl", "rank": 32},
    "ceilings": CEILINGS | {"ridge flop/byte": 3.56},
    "ceilings at the end": CEILINGS | {"ridge flop/byte": 3.56},
    "phases": [
        {"phase": "forward", "p50 s": 0.02, "flops": 1e9, "bytes": 1e8, "least bytes": 1e7}
        | {"bound": "products", "mfu": 0.704, "share of copy": 0.25, "share of roof": 0.7}
        | {"note": "once"},
        {"phase": "encode", "p50 s": None, "flops": 1e9, "bytes": 1e8, "least bytes": 1e7}
        | {"bound": "memory", "mfu": None, "share of copy": None, "share of roof": None}
        | {"note": ""},
    ],
    "mfu": 0.7,
    "profile": {
        "engine": "eager",
        "profiled step s": 0.05,
        "families": [{"family": "attention", "s": 0.01, "share": 0.2, "calls": None}],
        "top": [{"name": "aten::bmm", "family": "attention", "s": 0.01, "share": 0.2, "calls": 7}],
    },
}


@pytest.fixture
def races(tmp_path):
    """Files of an earlier race, and of one whose step is a fifth slower."""
    old, new = tmp_path / "old.json", tmp_path / "cpu-race-mini-sdxl-2030-01-03.json"
    write_race(old, make_race())
    write_race(
        new, make_race(make_entrants(ppt_step=0.06), command="python -m bench.race --x 'a b'")
    )
    return old, new


def write_page(tmp_path, *arguments):
    page = tmp_path / "report.html"
    report.main([*map(str, arguments), "--output", str(page)])
    return page.read_text()


class Tags(html.parser.HTMLParser):
    """Fails where a tag is closed that is not open; counts, and keeps links and texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.counts, self.links, self.ids = [], Counter(), [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.counts[tag] += 1
        self.links += [given[name] for name in ("href", "src") if name in given]
        self.ids.add(given.get("id"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.counts[tag] += 1


def test_the_page_of_all_results_is_whole_and_loads_nothing(tmp_path, races):
    text = write_page(tmp_path, RESULTS, races[1])
    tags = Tags(text)
    headings = tags.counts["h2"]
    assert headings >= 8 and headings == tags.counts["section"]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in tags.links)
    assert {link[1:] for link in tags.links if link.startswith("#")} <= tags.ids
    # The pictures that lie beside results, and no script.
    assert tags.counts["img"] >= 3 and tags.counts["script"] == 0
    assert re.search(r"url\(|@import", text) is None


def test_the_race_is_shown_with_its_settings_numbers_and_command(tmp_path, races):
    text = write_page(tmp_path, races[1])
    for part in (
        "100 class images in 50 steps each",
        # 225.98 s over 6.08 s, the graph's.
        "<b>37.2x</b>",
        "torch 2.13.0",
        "python -m bench.race --x &#x27;a b&#x27;",
        "git checkout abcdef0",
    ):
        assert part in text
    # Two stacks, two charts of ratios.
    assert text.count("<svg") == 4


def test_a_stronger_peer_stands_beside_the_quoted_ratio(tmp_path):
    cached = make_entrant("cached latents", step=0.1, class_images=200.0, kind="diffusers")
    path = tmp_path / "race.json"
    write_race(path, make_race([*make_entrants(), cached]))
    text = write_page(tmp_path, path)
    # 222 s over 6.08 s: 2 s + 200 s + 19.9 s + 0.1 s.
    assert "<b>37.2x</b>" in text and "<span>36.51x against cached latents</span>" in text


def test_what_is_extrapolated_is_marked_in_the_charts_too(tmp_path, capsys):
    entrants = make_entrants()
    peer = entrants[0]
    part = [each.model_copy(update={"extrapolated": ["class_images"]}) for each in peer.rounds]
    path, old = tmp_path / "race.json", tmp_path / "old.json"
    write_race(path, make_race([peer.model_copy(update={"rounds": part}), *entrants[1:]]))
    write_race(old, make_race())
    text = write_page(tmp_path, path, "--against", old)
    said = f"Extrapolated from a part of the work: {PEER} (class images)."
    assert said in text and said in capsys.readouterr().out
    whole, cached, total, on_disk = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert f"{PEER}†</text>" in whole and f"{PPT_EAGER}†</text>" in total
    assert f"{PEER}</text>" in cached and "†" not in cached and "†" not in on_disk
    assert "whole job († in part extrapolated):" in text


def test_a_planted_regression_is_marked_on_the_page_and_printed(tmp_path, races, capsys):
    text = write_page(tmp_path, races[1], "--against", races[0])
    printed = capsys.readouterr().out
    assert "worse than in" in printed and ": 6\n" in printed
    # 9 ratios, and 6 numbers of the two with class images 8: of 3 rounds 3 %.
    assert "37 numbers were held against their spread over 3 rounds" in printed
    assert "would call about 1.1 of them worse" in printed and "about 1.1 of them" in text
    assert f"{PPT_EAGER}: step, ms: 50.0 (49.0 to 51.5) -> 60.0 (58.8 to 61.8) (1.20x)" in printed
    assert re.search(rf'<tr class="worse"><th scope="row">{PPT_EAGER}: step, ms</th>', text)
    assert "<h3>Worse: 6</h3>" in text


def test_the_same_race_is_no_worse_than_itself(tmp_path, races, capsys):
    text = write_page(tmp_path, races[1], "--against", races[1])
    assert ": nothing\n" in capsys.readouterr().out
    assert 'class="worse"' not in text and "<h3>Worse: nothing</h3>" in text


def test_scaling_and_roofline_have_their_fits_phases_and_pictures(tmp_path):
    for name, content in (("scaling", SCALING), ("roofline", ROOFLINE)):
        (tmp_path / f"cpu-{name}-mini-sdxl-2030-01-02.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r"mini-sdxl-rank-2030-01-02\.png: no such"):
        write_page(tmp_path, tmp_path)
    for name in ("scaling-mini-sdxl-rank", "roofline-mini-sdxl"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"cpu-{name}-2030-01-02.png")
    text = write_page(tmp_path, tmp_path)
    assert "exponent 0.50" in text and "4096: too large" in text
    assert "<td>70.4%</td>" in text and "not measured" in text and "aten::bmm" in text
    assert Tags(text).counts["img"] == 2
    assert SCALING["command"] in text and report.COMMANDS["roofline"] in text
    for part in (
        "<td>0.05</td><td>2</td><td>0.049 to 0.052</td><td>33</td>",
        "ran 0.97 times as fast after it",
        "float32 (A CPU, 1 thread, torch 2.13.0, 2030-01-02).",
        "<caption>A profiled step by families of kernels: eager, 50.0 ms, of which",
    ):
        assert part in text
    # Of the subjects alone.
    assert text.count(join(ABOUT_RUNS)) == text.count(join(ABOUT_SUBJECTS)) == 1
    assert (STEP, RUNS) == (scaling_axes.STEP, scaling_axes.RUNS)


def test_races_of_a_gpu_say_on_how_much_of_the_work_they_rest(tmp_path):
    row = {"suite": "race", "model": "sdxl", "file": "cuda-race-sdxl.json", "left out": ["apt"]}
    row |= {"steps": 500, "trained steps": 50, "class images": 100, "sampled images": 8}
    content = {"machine": MACHINE, "tests": {}, "rows": [row | {"times as fast": {"total": 12.3}}]}
    target = {"what": "SDXL", "target": 11.0, "measured": 12.3, "met": True}
    content |= {"targets": [target], "refused": [], "not measured": []}
    path = tmp_path / "race-gpu-2030-01-02.json"
    path.write_text(json.dumps(content))
    text = write_page(tmp_path, path)
    assert "times as fast, extrapolated" in text and "are extrapolated from it" in text
    assert "<td>total 12.30x</td><td>50 of 500</td><td>8 of 100</td>" in text
    assert "<td>11</td><td>12.3</td><td>met</td>" in text


def test_every_result_that_is_kept_has_a_kind():
    results = read_results([RESULTS])
    assert {result.kind for result in results} <= set(KINDS)
    named = {path.stem.rsplit("-", 3)[0] for path in RESULTS.glob("c*.json")}
    assert len(results) >= len(named)
    assert set(KINDS) == set(report.HEADINGS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[]", "no report of a bench"),
        ('{"machine": {}, "kind": "what"}', "no report of a bench"),
        ('{"machine": {}, "kind": "race"}', "not a race: settings"),
    ],
)
def test_a_file_that_is_no_result_is_refused_by_its_name(tmp_path, text, said):
    path = tmp_path / "some.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=f"some.json: {said}"):
        write_page(tmp_path, path)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_without_results_is_refused(tmp_path):
    (tmp_path / "red-gpu-x-2030-01-02.json").write_text("{}")
    with pytest.raises(SystemExit, match="found no cpu-"):
        write_page(tmp_path, tmp_path)


def test_against_wants_one_race_and_one_of_the_same_work(tmp_path, races):
    old, new = races
    with pytest.raises(SystemExit, match=r"want one race among the results, found 2.*\n.*old"):
        write_page(tmp_path, *races, "--against", old)
    write_race(old, make_race(steps=100))
    with pytest.raises(SystemExit, match="differ in steps 100 and 200"):
        write_page(tmp_path, new, "--against", old)


def test_of_a_folder_the_latest_of_each_name_counts(tmp_path):
    for day in ("01", "03", "02"):
        write_race(tmp_path / f"cpu-race-mini-sdxl-2030-01-{day}.json", make_race())
    write_race(tmp_path / "cpu-race-mini-sd-2030-01-01.json", make_race())
    names = [result.path.name for result in read_results([tmp_path])]
    assert names == ["cpu-race-mini-sd-2030-01-01.json", "cpu-race-mini-sdxl-2030-01-03.json"]


def test_pictures_are_those_of_the_bench_and_the_day(tmp_path):
    path = tmp_path / "cpu-race-2030-01-02.json"
    write_race(path, make_race())
    for name in ("race-2030-01-02", "race-b-2030-01-02", "race-2030-01-03", "racer-2030-01-02"):
        (tmp_path / f"cpu-{name}.png").touch()
    found = [picture.name for picture in read_result(path).pictures]
    assert found == ["cpu-race-2030-01-02.png", "cpu-race-b-2030-01-02.png"]


def test_text_is_escaped_and_html_is_not():
    cell = join("a < b & ", element("b", "<i>"))
    assert cell == "a &lt; b &amp; <b>&lt;i&gt;</b>"
    text = table(["", '"'], [["x", cell]], marks={0: "worse"})
    assert '<th scope="col">&quot;</th>' in text
    assert f'<tr class="worse"><th scope="row">x</th><td>{cell}</td></tr>' in text


def test_markdown_of_tables_becomes_html():
    text = render("**a** of *b c* (`x_*y*`), 2 * 3 < 7\nand on:\n\n| | `k` |\n|---|---|\n| 1 | |")
    assert text.startswith(
        "<p><strong>a</strong> of <em>b c</em> (<code>x_*y*</code>), 2 * 3 &lt; 7 and on:</p>"
    )
    assert '<th scope="col"></th><th scope="col"><code>k</code></th>' in text
    assert '<tr><th scope="row">1</th><td></td></tr>' in text


@pytest.mark.parametrize(
    ("largest", "ticks"),
    [
        (9.94, [0, 2, 4, 6, 8, 10]),
        (6.0, [0, 1, 2, 3, 4, 5, 6]),
        (0.031, [0, 0.01, 0.02, 0.03, 0.04]),
    ],
)
def test_ticks_are_round_and_reach_over_the_largest(largest, ticks):
    assert choose_ticks(largest) == pytest.approx(ticks)


def test_a_stack_is_as_long_as_its_parts():
    text = draw_stacks(
        {"one": {"a": 1.0, "b": 3.0}, "two": {"b": 2.0}}, ["a", "b"], unit="s", title=""
    )
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="18"', text)]
    # Of 4 s each: a's, b's, and b's of the second.
    assert widths == pytest.approx([widths[0], 3 * widths[0], 2 * widths[0]])
    assert "4 s</text>" in text


def test_a_ratio_lies_between_its_ends_and_right_of_one():
    text = draw_intervals([Interval("one", 8.0, 4.0, 16.0)], title="t")
    (left, right) = map(float, re.search(r'x1="([\d.]+)" x2="([\d.]+)" y1="39"', text).groups())
    middle = float(re.search(r'cx="([\d.]+)"', text)[1])
    # Logarithmic: 8 is in the middle of 4 and 16, 1 two and three such steps before.
    one = float(re.search(r'<line y1="24" x1="([\d.]+)"[^>]*stroke-width="2"', text)[1])
    assert middle == pytest.approx((left + right) / 2, abs=0.1)
    assert middle - one == pytest.approx(3 * (right - middle), abs=0.2)


@pytest.mark.slow
def test_chromium_shows_the_page_without_a_complaint(tmp_path, races):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    write_page(tmp_path, races[1], "--against", races[0])
    shot = tmp_path / "shot.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,1500"]
    command += ["--enable-logging=stderr", f"--screenshot={shot}"]
    done = subprocess.run(
        [*command, (tmp_path / "report.html").as_uri()], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert pixels.shape == (1500, 1200, 3)
    colors = {tuple(color) for color in pixels.reshape(-1, 3)[::7]}
    # The tint of rows that became worse: the style is in force.
    assert (253, 236, 235) in colors and len(colors) > 20
