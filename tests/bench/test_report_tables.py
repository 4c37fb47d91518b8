import re

import pytest

from bench import tables
from bench.race_results import write_race
from bench.race_tables import (
    decomposition_table,
    describe_settings,
    race_tables,
    ratio_tables,
    seconds_table,
)
from tests.bench.report_races import (
    LORA_PRIOR,
    MACHINE,
    PEER,
    PPT_EAGER,
    PPT_GRAPH,
    SETTINGS,
    make_entrant,
    make_entrants,
    make_race,
)


def cells(text, name):
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def test_settings_and_machine_name_all_that_the_numbers_depend_on():
    text = race_tables(make_race())
    head = text.splitlines()[0]
    for part in (
        *("mini-sdxl (sdxl) at 64 pixels", "200 steps", "5 photos", "batch 1", "float32", "rank 4"),
        *("100 class images in 50 steps each", "guidance 7.5", "1 thread", "3 rounds", "seed 0"),
        *("A CPU", "python 3.11.7", "torch 2.13.0", "triton 3.7.1", "diffusers 0.42.1"),
        *("engine eager and graph", "2030-01-02"),
    ):
        assert part in head
    once = SETTINGS.model_copy(update={"sampling_rounds": 1})
    assert "class images were sampled in 1 round of them" in describe_settings(once)


def test_an_entrant_has_its_medians_and_nothing_where_it_has_no_phase():
    text = seconds_table(make_race())
    heads = cells(text, "medians over rounds")
    assert heads[:4] == ["load, s", "class images, s", "training, s", "save, s"]
    assert heads[4:] == ["whole job, s", "step, ms", "peak memory, MB"]
    # 199 steps of 0.12 s; 2 s + 200 s + 23.88 s + 0.1 s.
    assert cells(text, PEER) == ["2.00", "200", "23.9", "0.1", "226", "120", "500"]
    assert cells(text, PPT_EAGER) == ["2.00", "", "9.95", "0.1", "12.1", "50.0", "500"]
    assert "†" not in text and "‡" not in text
    assert "resident memory of the process" in text


def test_a_race_with_compile_or_on_a_gpu_says_that_every_job_compiles_anew():
    entrants = make_entrants()
    assert "compiles anew" not in seconds_table(make_race(entrants))
    on_a_gpu = make_race(entrants, machine=MACHINE | {"device": "cuda"})
    assert "Each of our jobs compiles anew" in seconds_table(on_a_gpu)
    entrants.append(make_entrant("ppt-lora, compile", step=0.04, engine="compile"))
    assert "Each of our jobs compiles anew" in seconds_table(make_race(entrants))


def test_when_another_trainers_command_ran_is_said():
    its = make_entrant("its own command", step=0.2, kind="external", settings={"load": 0.63})
    text = seconds_table(make_race([*make_entrants(), its], machine=MACHINE | {"load": 1.5}))
    assert "Own commands ran after the others (load 0.63; 1.5 before these)" in text
    assert "ran after the others" not in seconds_table(make_race([its]))


def mark(entrant, **changes):
    rounds = [each.model_copy(update=changes) for each in entrant.rounds]
    return entrant.model_copy(update={"rounds": rounds})


def test_what_was_extrapolated_or_taken_over_is_marked_and_explained():
    peer, lora_prior, *others = make_entrants()
    race = make_race(
        [
            mark(peer, extrapolated=["class_images"]),
            mark(lora_prior, taken_from={"class_images": "another"}),
            *others,
        ]
    )
    # With class images on disk it is left out, and a step is timed as it is.
    assert [cell.endswith("x†") for cell in cells(ratio_tables(race), PPT_EAGER)] == [
        *(True, False, False)
    ]
    assert "| ppt-lora | whole job | graph | 37.17x† |" in decomposition_table(race)
    text = seconds_table(race)
    assert cells(text, PEER)[1] == "200†" and cells(text, PEER)[4] == "226†"
    assert cells(text, LORA_PRIOR)[1] == "150‡" and cells(text, LORA_PRIOR)[4] == "170"
    assert f"† measured on a part of the work and extrapolated: {PEER}: class images." in text
    assert "‡ the time of another entrant or round" in text


def test_energy_has_a_column_where_it_was_measured():
    entrant = make_entrant("one", step=0.1)
    text = seconds_table(
        make_race([mark(entrant, energy_joules={"load": 20.0, "training": 300.0})])
    )
    assert cells(text, "medians over rounds")[-1] == "energy, J"
    assert cells(text, "one")[-1] == "320"
    assert "energy" not in seconds_table(make_race())


def test_ratios_have_their_reach_over_rounds():
    race = make_race()
    ratios = [
        each.model_copy(update={"low": 2.25, "high": 2.5})
        if (each.of, each.what) == (PPT_EAGER, "step")
        else each
        for each in race.ratios
    ]
    text = ratio_tables(race.model_copy(update={"ratios": ratios}))
    assert f"Times as fast as *{PEER}*" in text
    # 225.98 s and 25.98 s over 12.05 s; 0.12 s over 0.05 s.
    assert cells(text, PPT_EAGER) == ["18.75x", "2.16x", "2.40x (2.25 to 2.50)"]
    assert ratio_tables(make_race([make_entrant("one", step=0.1)])) == ""


def test_the_parts_of_a_ratio_multiply_to_it():
    text = decomposition_table(make_race())
    step = next(line for line in text.splitlines() if line.startswith("| ppt-lora | one step"))
    best, *parts = [cell.strip() for cell in step.strip("|").split("|")[2:]]
    whole, eager, trainer, method, engine = (float(part.rstrip("x")) for part in parts)
    assert best == "graph"
    assert whole == pytest.approx(6.0) and eager == pytest.approx(2.4)
    assert engine == pytest.approx(2.5) and method == pytest.approx(1.8)
    assert whole == pytest.approx(trainer * method * engine, rel=0.01)
    assert decomposition_table(make_race([make_entrant("one", step=0.1)])) == ""


def test_the_readme_has_the_latest_race_of_each_model_and_device(tmp_path):
    def write(name, label="", **changes):
        race = make_race(machine=MACHINE | {"date": name[-10:]}, **changes)
        race = race.model_copy(update={"label": label})
        write_race(tmp_path / f"{name}.json", race)

    write("cpu-race-mini-sdxl-2030-01-02")
    write("cpu-race-mini-sdxl-2030-01-03", steps=300)
    write("cpu-race-mini-sdxl-two-engines-2030-01-01", "two-engines", steps=400)
    write("cuda-race-sdxl-2030-01-01", model="models/sdxl")
    write("red-cuda-race-sd15-2030-01-01", model="sd15")
    text = tables.write_race_tables(tmp_path)
    heads = re.findall(r"\*\*One subject.*", text)
    models = [head.split(": ")[1].split(" ")[0] for head in heads]
    assert models == ["mini-sdxl", "mini-sdxl", "models/sdxl"]
    assert "300 steps" in heads[0] and "2030-01-03" in heads[0]
    assert ["written, two engines**" in head for head in heads] == [False, True, False]
    # What a label sets apart has no tables of ratios.
    assert text.count("Times as fast as") == 2 * ratio_tables(make_race()).count("Times as fast as")
    assert f"| {PPT_GRAPH} |" in text
