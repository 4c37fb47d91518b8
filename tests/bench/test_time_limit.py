import signal
import time

import pytest

from bench.time_limit import OutOfTimeError, at_most


def test_a_block_past_its_time_is_ended():
    start = time.monotonic()
    with pytest.raises(OutOfTimeError), at_most(0.05):
        time.sleep(30)
    assert time.monotonic() - start < 10
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_block_inside_another_leaves_that_ones_time_as_it_is():
    def wait():
        with pytest.raises(OutOfTimeError), at_most(0.05):
            time.sleep(30)
        with at_most(60):
            pass
        time.sleep(30)

    start = time.monotonic()
    with pytest.raises(OutOfTimeError), at_most(0.3):
        wait()
    assert 0.25 < time.monotonic() - start < 10


def test_a_time_that_was_up_inside_the_inner_block_ends_the_outer_one_after_it():
    def wait():
        with at_most(60):
            time.sleep(0.2)
        time.sleep(30)

    with pytest.raises(OutOfTimeError), at_most(0.05):
        wait()


def test_what_a_compiler_makes_of_the_error_is_the_time_too():
    def compile_slowly():
        try:
            time.sleep(30)
        except Exception as error:
            raise RuntimeError("backend='inductor' raised") from error

    with pytest.raises(OutOfTimeError) as raised, at_most(0.05):
        compile_slowly()
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_an_error_before_the_time_is_up_stays_what_it_is():
    with pytest.raises(RuntimeError, match="of its own"), at_most(60):
        raise RuntimeError("of its own")
