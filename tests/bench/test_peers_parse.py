import io

import pytest
from tqdm import tqdm

from bench.peers.parse import Bar, BarReader, Log, printed_rate, read_round
from fastppt.errors import UserError

DRAWN = (
    "loading\n\rSteps:   0%|          | 0/4 [00:00<?, ?it/s]"
    "\rSteps:  25%|██▌       | 1/4 [00:02<00:06,  2.00s/it, loss=0.1, lr=0.0001]"
    "\rSteps:  50%|█████     | 2/4 [00:02<00:02,  1.25it/s, loss=0.2]\ndone\n"
)


def read_all(text):
    return BarReader().read(text.encode(), 1.0)


def log_of(*drawings, done_s=100.0, start_s=None):
    """Return a log of bars given as (name, count, total, at_s)."""
    bars = [Bar(name, count, total, 1.0, at_s) for name, count, total, at_s in drawings]
    return Log(bars, done_s, start_s, 1000, "resident")


def steps_at(*seconds, counts=None, total=None):
    counts = range(len(seconds)) if counts is None else counts
    total = total or len(seconds) - 1
    return [("Steps", count, total, at) for count, at in zip(counts, seconds, strict=True)]


def read(log, steps, **kind):
    return read_round(log, steps, training="Steps", class_images=None, **kind)


def test_bars_are_found_with_their_rates_in_steps_a_second():
    found = [(bar.name, bar.count, bar.total, bar.rate) for bar in read_all(DRAWN)]
    assert found == [("Steps", 0, 4, None), ("Steps", 1, 4, 0.5), ("Steps", 2, 4, 1.25)]


def test_each_bar_is_found_once_wherever_the_output_is_cut():
    data = DRAWN.encode()
    for cut in range(len(data)):
        reader = BarReader()
        found = reader.read(data[:cut], 1.0) + reader.read(data[cut:], 2.0)
        assert [bar.count for bar in found] == [0, 1, 2], cut


def test_a_bar_is_found_before_its_line_ends():
    reader = BarReader()
    (bar,) = reader.read(b"\rSteps:  25%|##        | 1/4 [00:02<00:06,  2.00s/it", 3.0)
    assert bar.at_s == 3.0
    assert reader.read(b", loss=0.1]\r", 5.0) == []


def test_what_tqdm_draws_is_read():
    file = io.StringIO()
    outer = tqdm(total=1, desc="epoch", file=file, mininterval=0, miniters=1)
    with tqdm(total=3, desc="step", file=file, mininterval=0, miniters=1, position=1) as bar:
        for _ in range(3):
            bar.update()
            bar.set_postfix(loss=0.1)
    outer.update()
    outer.close()
    bars = read_all(file.getvalue())
    steps = [bar.count for bar in bars if bar.name == "step"]
    assert steps[0] == 0 and steps[-1] == 3 and sorted(set(steps)) == [0, 1, 2, 3]
    assert {bar.total for bar in bars if bar.name == "epoch"} == {1}
    assert printed_rate(bars, "step") > 0


def test_the_rate_is_that_of_the_last_step_and_not_of_the_bar_when_it_is_closed():
    rates = ((0, None), (1, 2.0), (2, 4.0), (2, 4.0), (2, 0.5))
    bars = [Bar("Steps", count, 2, rate, 1.0) for count, rate in rates]
    assert printed_rate(bars, "Steps") == 4.0
    assert printed_rate(bars[:1], "Steps") is None


def test_the_begin_is_found_once_wherever_the_output_is_cut():
    text = "loading\nINFO - Distributed environment: NO\nDistributed environment: NO\n"
    for cut in range(len(text)):
        reader = BarReader(begins="Distributed environment: ")
        reader.read(text[:cut].encode(), 1.0)
        reader.read(text[cut:].encode(), 2.0)
        reader.read(text.encode(), 3.0)
        assert reader.begun_s == (1.0 if cut >= text.index("NO") else 2.0), cut


@pytest.mark.parametrize(
    "line",
    [
        "  5%|5         | 1/20 [00:01<00:19,  1.00it/s]",
        "100%|##########| 7/7 [01:00<00:00,  8.57s/it]",
    ],
)
def test_a_bar_without_a_name_has_an_empty_one(line):
    (bar,) = read_all(line)
    assert bar.name == ""


def test_text_that_is_no_bar_is_left_alone():
    assert read_all("epoch 1/2 done, 50% of 3/4\n10%| disk used\nloss 0.1 [ok]\n") == []


def test_the_bar_parts_first_step_training_and_save():
    found = read(log_of(*steps_at(20.0, 24.0, 25.0, 26.0, 28.0), done_s=31.0), 4)
    assert found.phases == {"first_step": 4.0, "training": 4.0, "save": 3.0, "other": 20.0}
    assert found.steps == 4
    assert found.step_s.p50 == 1.0
    assert (found.peak_memory_bytes, found.memory_kind) == (1000, "resident")


def test_start_and_class_images_are_taken_from_what_came_before():
    images = [("Generating class images", n, 2, at) for n, at in enumerate((8.0, 10.0, 12.0))]
    # Its closing drawing comes when all has been saved.
    images.append(("Generating class images", 2, 2, 13.0))
    log = log_of(*images, *steps_at(20.0, 24.0, 25.0, 26.0), done_s=30.0, start_s=5.0)
    found = read_round(log, 3, training="Steps", class_images="Generating class images")
    assert found.start_s == 5.0
    assert found.phases["class_images"] == 4.0
    assert found.phases["other"] == 20.0 - 4.0 - 5.0
    assert sum(found.phases.values()) + found.start_s == 30.0


def test_batches_of_class_images_are_timed_one_by_one():
    images = [("images", n, 5, at) for n, at in enumerate((8.0, 20.0, 21.0, 23.0, 26.0, 30.0))]
    log = log_of(*images, *steps_at(40.0, 41.0, 42.0, 43.0))
    found = read_round(log, 3, training="Steps", class_images="images")
    # The first is slower, as it is with us, and is none of them.
    assert found.batch_s.p50 == 2.5 and 1.0 < found.batch_s.p20 < found.batch_s.p80 < 4.0
    least, most = found.reach("total")
    assert least < found.seconds("total") < most


def test_a_start_that_took_longer_alone_leaves_no_negative_rest():
    found = read(log_of(*steps_at(4.0, 5.0, 6.0, 7.0), start_s=6.0), 3)
    assert (found.start_s, found.phases["other"]) == (4.0, 0.0)


def test_of_steps_drawn_together_each_gets_its_part():
    log = log_of(*steps_at(10.0, 13.0, 15.0, 17.0, counts=(0, 2, 6, 7), total=7))
    found = read(log, 7)
    # Four took half a second each, one took two.
    assert found.step_s.p50 == 0.5
    # Two steps in the first 3 seconds, of which the second took such a half.
    assert (found.phases["first_step"], found.phases["training"]) == (2.5, 4.5)


def test_counts_that_were_read_at_once_are_one_drawing():
    bars = steps_at(0.0, 2.0, 3.0, 5.0, 5.0, counts=(0, 1, 2, 3, 4), total=4)
    found = read(log_of(*bars), 4)
    assert (found.step_s.p20, found.step_s.p80, found.phases["training"]) == (1.0, 1.0, 3.0)


def test_a_bar_that_counts_steps_from_0_is_one_behind():
    log = log_of(*steps_at(10.0, 14.0, 15.0, 16.0, total=4), done_s=18.0)
    found = read(log, 4, counts_from=0)
    # The first drawing of 1 is that of the second step.
    assert (found.phases["first_step"], found.phases["training"]) == (3.0, 3.0)


@pytest.mark.parametrize(
    ("bars", "message"),
    [
        (steps_at(1.0, 2.0, 3.0), "ended at 2 of 2 steps, and 4 were asked for"),
        (steps_at(1.0, 2.0, 3.0, total=4), "ended at 2 of 4"),
        (steps_at(1.0, 2.0, 3.0, 4.0, 5.0, total=8), "ended at 4 of 8"),
        ([("epoch", 0, 4, 1.0)], r"no progress bar called 'Steps' .*'epoch'"),
        ([], "there were: none"),
        (steps_at(3.0, 4.0, counts=(3, 4), total=4), "went from 3 to 4 of 4"),
    ],
    ids=["fewer", "stopped", "more", "another name", "none", "seen late"],
)
def test_what_cannot_be_timed_is_refused(bars, message):
    with pytest.raises(UserError, match=message):
        read(log_of(*bars), 4)
