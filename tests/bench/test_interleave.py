import pytest

from bench.interleave import interleave, order_of_round, summarise


class FakeStopwatch:
    """Returns the milliseconds that a call names, and remembers the order."""

    def __init__(self):
        self.order = []

    def __call__(self, call):
        name, milliseconds = call()
        self.order.append(name)
        return milliseconds


def make_calls(**milliseconds):
    return {name: lambda n=name, m=ms: (n, m) for name, ms in milliseconds.items()}


def test_every_round_times_each_call_once():
    stopwatch = FakeStopwatch()
    timings = interleave(
        make_calls(a=10, b=20, c=70), seconds=0.6, stopwatch=stopwatch, warm_up_rounds=1
    )
    # 600 ms are six rounds of 100 ms, after one of warm-up.
    assert {len(t.rounds) for t in timings.values()} == {6}
    rounds = [stopwatch.order[i : i + 3] for i in range(0, len(stopwatch.order), 3)]
    assert len(rounds) == 7
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert [timings[name].p50 for name in "abc"] == [10, 20, 70]


def test_no_call_always_runs_after_the_same_other():
    rounds = [order_of_round(["a", "b", "c"], number) for number in range(6)]
    assert rounds[:3] == [["a", "b", "c"], ["c", "b", "a"], ["b", "c", "a"]]
    assert {names[0] for names in rounds} == {"a", "b", "c"}
    before_b = {names[names.index("b") - 1] for names in rounds if names[0] != "b"}
    assert before_b == {"a", "c"}


def test_slow_calls_are_timed_five_times_and_fast_ones_fifty():
    slow = interleave(make_calls(a=1e6), seconds=1, stopwatch=FakeStopwatch())
    fast = interleave(make_calls(a=1e-3), seconds=1, stopwatch=FakeStopwatch())
    assert (len(slow["a"].rounds), len(fast["a"].rounds)) == (5, 50)


def test_a_turn_of_many_calls_is_divided():
    timings = interleave(make_calls(a=12), seconds=1, stopwatch=FakeStopwatch(), calls_a_turn=4)
    assert timings["a"].p50 == 3


def test_percentiles_are_those_of_the_rounds():
    timing = summarise([float(n) for n in range(1, 12)])
    assert (timing.p20, timing.p50, timing.p80, len(timing.rounds)) == (3, 6, 9, 11)


def test_ratio_is_of_the_rounds_and_not_of_the_medians():
    # The machine is ten times slower in the last rounds; the medians' ratio would be 20.
    ours, theirs = summarise([1.0, 1.0, 1.0, 10.0, 10.0]), summarise([2.0, 2.0, 20.0, 20.0, 20.0])
    assert theirs.p50 / ours.p50 == 20
    assert theirs.times(ours) == 2


def test_a_drifting_clock_moves_both_calls_alike():
    now = 0.0

    def stopwatch(call):
        nonlocal now
        now += 1.0
        return call() * now

    timings = interleave(
        {"a": lambda: 1.0, "b": lambda: 2.0}, seconds=100, stopwatch=stopwatch, warm_up_rounds=0
    )
    assert timings["b"].times(timings["a"]) == pytest.approx(2, rel=0.05)
