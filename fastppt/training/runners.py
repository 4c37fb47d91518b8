"""Who runs the steps of a stage: Python, or graphs captured of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Protocol

from fastppt.config_types import Engine
from fastppt.training.constants import constants_of
from fastppt.training.graph import CapturedFunction, CudaRecorder, Recorder
from fastppt.training.snapshot import rule_out_updates, tensors_without_update
from fastppt.training.step import (
    Step,
    accumulate_gradients,
    needs_base_pass,
    run_step,
    update_parameters,
)


class StageRunner(Protocol):
    """Runs the steps of one stage.

    Its methods take the index of a step among those of the stage's buckets, and the number of the
    optimizer step in the stage, from 0.
    """

    def is_ready(self, bucket: int, number: int) -> bool:
        """Say whether nothing is left to be made before this step."""

    def prepare(self, bucket: int, number: int) -> None:
        """Make what the step takes; nothing that a step writes changes."""

    def run(self, bucket: int, number: int) -> None:
        """Take one optimizer step."""


class EagerRunner:
    """Runs each step in Python, op by op (or block by block, where the network is compiled)."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps

    def is_ready(self, bucket: int, number: int) -> bool:
        """Say so at once: there is nothing to make."""
        return True

    def prepare(self, bucket: int, number: int) -> None:
        """Do nothing."""

    def run(self, bucket: int, number: int) -> None:
        """Take one optimizer step."""
        run_step(self._steps[bucket], number)


class GraphRunner:
    """Replays steps, each captured when it is first wanted.

    A step is one graph. With gradient accumulation it is two, one pass and the update, and all
    buckets share the update. Steps with a base pass and steps without are graphs of their own.

    Args:
        steps: Of the buckets; they share all but latents and prompts.
        recorder: Who captures; all graphs of the stage share its memory pool.
    """

    def __init__(self, steps: Sequence[Step], recorder: Recorder) -> None:
        self._steps = steps
        self._recorder = recorder
        self._captured: dict[Hashable, CapturedFunction] = {}

    def is_ready(self, bucket: int, number: int) -> bool:
        """Say whether the step's graphs have been captured."""
        return all(part.replay is not None for part in self._parts(bucket, number))

    def prepare(self, bucket: int, number: int) -> None:
        """Capture the step's graphs.

        Raises:
            UserError: the step cannot be captured; with the reason.
        """
        for part in self._parts(bucket, number):
            part.capture()

    def run(self, bucket: int, number: int) -> None:
        """Replay one optimizer step.

        Raises:
            UserError: as `prepare`; or something that the graphs hold for good has changed.
        """
        for part in self._parts(bucket, number):
            part()

    def _parts(self, bucket: int, number: int) -> list[CapturedFunction]:
        """Return what makes up the step, in order."""
        step = self._steps[bucket]
        num_passes = step.stage.gradient_accumulation
        with_base = needs_base_pass(step.stage, number)
        if num_passes == 1:
            return [self._get(("step", bucket, with_base), step, partial(run_step, step, number))]
        accumulate = partial(accumulate_gradients, step, with_base=with_base)
        one_pass = self._get(("pass", bucket, with_base), step, accumulate)
        shared = self._steps[0]
        update = self._get("update", shared, partial(update_parameters, shared))
        return [*[one_pass] * num_passes, update]

    def _get(self, key: Hashable, step: Step, function: Callable[[], None]) -> CapturedFunction:
        """Return the function under this key, made now where it is new."""
        if key not in self._captured:
            self._captured[key] = CapturedFunction(
                function,
                self._recorder,
                written=partial(tensors_without_update, step),
                constants=partial(constants_of, step),
                before_each=partial(rule_out_updates, step),
            )
        return self._captured[key]


def make_runner(engine: Engine, steps: Sequence[Step]) -> StageRunner:
    """Return who runs the steps of a stage under a resolved engine."""
    if not engine.startswith("graph"):
        return EagerRunner(steps)
    generators = [*steps[0].generators.values()]
    return GraphRunner(steps, CudaRecorder(steps[0].family.device, generators))
