"""Steps whose loss or gradient is not finite: left out on the device, counted and named here.

The step itself sees to it that they change nothing (`step.update_parameters`); the host learns of
them when it reads the metric ring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Steps, photos and timesteps that one message lists.
MOST_LISTED = 4


@dataclass(frozen=True)
class BadStep:
    """A step that was left out.

    Attributes:
        step: Counted from 1.
        photos: File names, of each sample of the step.
        timesteps: Likewise.
    """

    step: int
    photos: tuple[str, ...]
    timesteps: tuple[int, ...]


class NonFiniteGuard:
    """Counts the steps whose loss or gradient is not finite.

    A float16 step that the loss scale backs off from is skipped, and no bad step: that is how the
    scale finds its size. With a finite loss such a step is bad only once the scale is 1 or less.

    Args:
        most_in_a_row: Bad steps in a row after which the run is to stop.
        photo_names: File names by the photos' numbers in the run.

    Attributes:
        num_bad: Bad steps of the run so far.
        in_a_row: Those since the last good step.
    """

    def __init__(self, most_in_a_row: int, photo_names: Mapping[int, str]) -> None:
        self.num_bad = 0
        self.in_a_row: list[BadStep] = []
        self._most_in_a_row = most_in_a_row
        self._photo_names = photo_names
        self._next_note = 1

    @property
    def wants_stop(self) -> bool:
        """Say whether too many steps in a row were bad."""
        return len(self.in_a_row) >= self._most_in_a_row

    def describe(
        self, row: Mapping[str, float], samples_of: Callable[[int], Sequence[tuple[int, int]]]
    ) -> dict[str, Any]:
        """Return a step's row as it is stored.

        Args:
            row: From the metric ring, with its columns `skipped` and `bad`.
            samples_of: Returns photo number and timestep of each sample of a step.

        Returns:
            The row with `skipped` as 0 or 1; of a bad step also `photos` and `timesteps`, a list
            each.
        """
        stored: dict[str, Any] = dict(row)
        stored["skipped"] = int(row["skipped"])
        if stored.pop("bad"):
            samples = samples_of(int(row["step"]))
            stored["photos"] = [self._photo_names[photo] for photo, _ in samples]
            stored["timesteps"] = [timestep for _, timestep in samples]
        return stored

    def count(self, rows: Iterable[Mapping[str, Any]]) -> list[BadStep]:
        """Count the bad ones among the next steps.

        Args:
            rows: As `describe` returns them. Those after the one with which `wants_stop` comes true
                are not looked at.

        Returns:
            The bad ones.
        """
        found = []
        for row in rows:
            if self.wants_stop:
                break
            if "photos" not in row:
                self.in_a_row.clear()
                continue
            bad = BadStep(int(row["step"]), tuple(row["photos"]), tuple(row["timesteps"]))
            self.in_a_row.append(bad)
            found.append(bad)
        self.num_bad += len(found)
        return found

    def take_up(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Go on counting where a run that is resumed left off.

        Bad steps that stopped it are over: those after them are a row of their own.

        Args:
            rows: Of all steps before, as the file has them.
        """
        for row in rows:
            self.count([row])
            if self.wants_stop:
                self.in_a_row.clear()

    def note(self, found: Sequence[BadStep]) -> str | None:
        """Return a line for the user, seldom enough to be read.

        There is one where the count has doubled since the last.

        Args:
            found: What `count` has just returned.
        """
        if not found or self.num_bad < self._next_note:
            return None
        self._next_note = 2 * self.num_bad
        samples = [
            f"photo {photo} at timestep {timestep}"
            for bad in found
            for photo, timestep in zip(bad.photos, bad.timesteps, strict=True)
        ]
        return (
            f"{_steps(found)}: loss or gradient is not finite; left out ({_listed(samples)}); "
            f"{self.num_bad} so far"
        )

    def stop_message(self, checkpoint: Path) -> str:
        """Return why the run stops, and what to do.

        Args:
            checkpoint: The newest one.
        """
        bad = self.in_a_row
        photos = list(dict.fromkeys(photo for one in bad for photo in one.photos))
        timesteps = [timestep for one in bad for timestep in one.timesteps]
        return (
            f"loss or gradient was not finite in {len(bad)} steps in a row, {bad[0].step} to "
            f"{bad[-1].step} (photos {_listed(photos)}; timesteps {min(timesteps)} to "
            f"{max(timesteps)}), so the run has stopped. None of them has changed anything: "
            f"{checkpoint} is good, and --init-lora takes it as the start of a new run. "
            f"{_advice(photos, self._photo_names)}; max_bad_steps is how many are borne"
        )


def _advice(photos: Sequence[str], all_photos: Mapping[int, str]) -> str:
    if len(photos) < len(set(all_photos.values())):
        which, it = ("that photo", "it") if len(photos) == 1 else ("those photos", "them")
        return f"Look at {which}, or leave {it} out"
    return (
        "It is so with every photo: check the model's weights, lower the learning rate, or pass "
        "--precision bf16 or fp32"
    )


def _steps(found: Sequence[BadStep]) -> str:
    return f"step{'s' * (len(found) > 1)} {_listed([str(bad.step) for bad in found])}"


def _listed(words: Sequence[str]) -> str:
    """Return the first words with commas between, and how many more there are."""
    more = len(words) - MOST_LISTED
    return ", ".join(words[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
