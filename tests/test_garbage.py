import gc
import weakref

import pytest

from fastppt.garbage import without_what_there_is


class Loop:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _nothing_frozen():
    # Some versions of Python begin with objects that are.
    gc.unfreeze()
    yield
    assert gc.get_freeze_count() == 0


def test_what_is_made_inside_is_collected_and_what_was_there_is_not_looked_at() -> None:
    before = weakref.ref(Loop())
    with without_what_there_is():
        inside = weakref.ref(Loop())
        gc.collect()
        assert before() is not None and inside() is None
    gc.collect()
    assert before() is None


def test_all_is_as_before_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), without_what_there_is():
        assert 1 / (gc.get_freeze_count() == 0)
