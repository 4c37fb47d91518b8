"""Going on with a run: where from, and with which of its settings changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from fastppt.config import RunConfig
from fastppt.config_io import build_config, render_toml
from fastppt.errors import UserError
from fastppt.families.loading import resolve_path
from fastppt.outputs.files import write_file
from fastppt.outputs.folder import RunFolder, delete_leftovers
from fastppt.outputs.lora_files import run_name
from fastppt.training.checkpoint import (
    Checkpoint,
    delete_checkpoint,
    find_checkpoints,
    read_checkpoint,
)

# Keys that a resumed run may have others of than the run so far. All others are refused: the run
# would not be the one that its configuration describes. So are fewer steps, and more of them in any
# stage but the last, or where the course of the learning rate depends on their number.
MAY_CHANGE = (
    # How steps run. The same mathematics, not the same bits.
    *("engine", "compile_scope", "gradient_checkpointing", "deterministic", "model.attention"),
    "stage.*.objectives.anchor.storage",
    # What is shown and kept.
    *("log_every", "sample_every", "samples.*", "prompts.contexts"),
    *("tensorboard", "plots", "checkpoint_every", "keep_checkpoints", "max_bad_steps"),
    *("stage.*.checkpoint_every", "save_dtype"),
    # Where the photos and captions are; what they are is compared by their hashes.
    *("photos.folder", "photos.captions"),
    "stage.*.objectives.prior_preservation.folder",
    # Where class images are kept, not what they are.
    "stage.*.objectives.prior_preservation.cache",
)
# Keys whose values are places on this machine.
PATHS = (
    *("photos.folder", "photos.captions", "model.config_folder", "stage.*.trainables.lora.init"),
    "stage.*.objectives.prior_preservation.folder",
    "stage.*.objectives.prior_preservation.cache",
)
MODELS = ("model.path", "model.vae")


@dataclass(frozen=True)
class Resumption:
    """A run that goes on.

    Attributes:
        folder: Its output.
        config: The run's, with what has been changed.
        changes: A line for each key that has been changed.
        checkpoint: Where it goes on; None where it has none yet, and starts over.
    """

    folder: RunFolder
    config: RunConfig
    changes: list[str]
    checkpoint: Checkpoint | None

    @property
    def step(self) -> int:
        """Steps that have been taken."""
        return 0 if self.checkpoint is None else self.checkpoint.manifest.step

    def describe(self, console: Console) -> None:
        """Say where the run goes on, and what has changed."""
        start = "there is no checkpoint yet: starting at step 0"
        if self.checkpoint is not None:
            start = f"going on after step {self.step} ({self.checkpoint.folder})"
        for line in (f"resume: {start}", *(f"changed: {change}" for change in self.changes)):
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def compare(self, machine: dict[str, str], encodings: str, console: Console) -> None:
        """Say what keeps the run from being, bit for bit, the one that was not interrupted."""
        if self.checkpoint is None:
            return
        saved = self.checkpoint.manifest
        notes = [
            f"{name} was {old} and is {machine.get(name)}"
            for name, old in saved.machine.items()
            if machine.get(name) != old
        ]
        if saved.identity.encodings != encodings:
            notes.append(
                "photos, class images or prompts are not encoded to the same numbers as before"
            )
        if notes:
            notes.append("the result need not be that of an uninterrupted run, bit for bit")
            text = f"note: {'; '.join(notes)}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    def accept(self, config: RunConfig) -> None:
        """Make the folder that of the run as it is resumed: what lies beyond its start is deleted.

        Cut short anywhere, that leaves a run that can be resumed. The model card, which says that a
        run is finished, goes before the configuration can ask for more steps; of the checkpoints,
        the newest goes first.

        Args:
            config: Resolved.

        Raises:
            UserError: something cannot be written or deleted.
        """
        delete_leftovers(self.folder, config)
        _delete_file(self.folder.card)
        text = render_toml(config)
        if self.folder.config.read_text(encoding="utf-8") != text:
            write_file(self.folder.config, text)
        for step, path in find_checkpoints(self.folder).items():
            if step > self.step:
                delete_checkpoint(path)
        for step, path in self.folder.grids().items():
            if step > self.step or self.checkpoint is None:
                _delete_file(path)


def find_run(path: Path) -> tuple[RunFolder, Path | None]:
    """Return the run that a path means, and the checkpoint in it, if it names one.

    Raises:
        UserError: there is no run.
    """
    if (path / "config.toml").is_file():
        return RunFolder(path), None
    root = path.absolute().parent.parent
    if path.absolute().parent.name == "checkpoints" and (root / "config.toml").is_file():
        return RunFolder(root), path.absolute()
    reason = "holds no run (there is no config.toml)" if path.is_dir() else "is not a folder"
    raise UserError(
        f"--resume {path}: {reason}; give the --output of a run, or one of its checkpoints"
    )


def plan_resume(
    folder: RunFolder, chosen: Path | None, settings: Sequence[tuple[str, Any]]
) -> Resumption | None:
    """Return how a run goes on; None where it is finished. Writes nothing.

    Args:
        folder: The run's.
        chosen: The checkpoint to go on from; None for the newest.
        settings: Keys to change, and their values.

    Raises:
        UserError: a checkpoint is damaged, a key must not change, or there is nothing to go on
            from.
    """
    before = _read_config(folder)
    config = build_config(file=folder.config, settings=settings)
    if Path(dict(settings).get("output", folder.root)).absolute() != folder.root.absolute():
        raise UserError(
            f"--output: a resumed run goes on in its own folder, {folder.root}; leave it out"
        )
    config = config.model_copy(update={"output": folder.root.absolute()})
    if config.name is None and run_name(config) != run_name(before):
        # The folder has been moved, and its files keep the name that they have.
        config = config.model_copy(update={"name": run_name(before)})
    asked = _differences(before, config)
    finished = folder.card.exists() and chosen is None
    if finished and not asked:
        return None
    if finished and _num_steps(config) == _num_steps(before):
        raise UserError(
            f"--resume {folder.root}: the run is finished, and only more steps of its last stage "
            f"would go on with it; asked for: {_in_words(asked)}"
        )
    _check_changes(before, config)
    checkpoint = _find_checkpoint(folder, chosen)
    if checkpoint is None:
        if finished:
            others = f"; --init-lora {folder.root} starts a new run from its adapters"
            raise UserError(
                f"--resume {folder.root}: the run is finished and has no checkpoint to go on from"
                f"{others if 'lora' in config.trainables else ''}"
            )
        return Resumption(folder, config, _lines(asked), None)
    # Not the file's: someone may have edited that.
    trained = _config_of(checkpoint)
    _check_changes(trained, config)
    return Resumption(folder, config, _lines(_differences(trained, config)), checkpoint)


def _read_config(folder: RunFolder) -> RunConfig:
    config = build_config(file=folder.config)
    if config.output is None:
        raise UserError(f"{folder.config}: was not written by a run")
    return config


def _config_of(checkpoint: Checkpoint) -> RunConfig:
    try:
        return RunConfig.model_validate(checkpoint.manifest.config)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"{checkpoint.folder}: its configuration has {key}, which this fastppt cannot read; "
            "resume with the version that wrote it"
        ) from None


def _find_checkpoint(folder: RunFolder, chosen: Path | None) -> Checkpoint | None:
    """Return the chosen checkpoint or the newest, checked; None where there is none.

    Raises:
        UserError: it is not there or damaged; the newest whole one before it is offered.
    """
    found = find_checkpoints(folder)
    paths = list(found.values())
    if chosen is not None:
        names = [path.name for path in paths]
        if chosen.name not in names:
            raise UserError(
                f"--resume {chosen}: there is no such checkpoint (there are: "
                f"{', '.join(sorted(names)) or 'none'})"
            )
        paths = paths[names.index(chosen.name) :]
    if not paths:
        return None
    try:
        return read_checkpoint(paths[0])
    except UserError as error:
        damage = str(error)
    for path in paths[1:]:
        try:
            read_checkpoint(path)
        except UserError:
            continue
        raise UserError(
            f"checkpoint {paths[0].name} is damaged: {damage}. The one before it is whole: go on "
            f"from there with --resume {path}"
        )
    raise UserError(
        f"checkpoint {paths[0].name} is damaged: {damage}. None before it is whole: delete "
        f"{folder.checkpoints} to start over with --resume {folder.root}"
    )


def _check_changes(old: RunConfig, new: RunConfig) -> None:
    """Refuse changes that would make another run of it.

    Raises:
        UserError: names each such key, and what it was and is; and the changes that are none of it.
    """
    changed = _differences(old, new)
    refused = {k: values for k, values in changed.items() if not _may_change(k, *values, new)}
    if refused:
        others = {key: values for key, values in changed.items() if key not in refused}
        borne = f" (these can: {_in_words(others)})" if others else ""
        raise UserError(
            f"--resume: these keys cannot change in a run that has begun: {_in_words(refused)}"
            f"{borne}. Leave them as they were, or start a new run"
        )


def _may_change(key: str, old: Any, new: Any, config: RunConfig) -> bool:
    if key == "model.device":
        # Another GPU is the same kind of device.
        return str(old).partition(":")[0] == str(new).partition(":")[0]
    if key == f"stage.{len(config.stage) - 1}.steps":
        return config.stage[-1].schedule == "constant" and new > old
    return any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)


def _differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the keys that differ, with what they were and are; None is unset."""
    tables = (config.model_dump(mode="json", exclude={"output"}) for config in (old, new))
    names = run_name(old), run_name(new)
    before, after = (
        dict(_flatten(table | {"name": name}, ""))
        for table, name in zip(tables, names, strict=True)
    )
    return {
        key: (before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    }


def _flatten(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Walk through tables and lists of them; places on this machine become absolute."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flatten(item, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, item in enumerate(value):
            yield from _flatten(item, f"{path}.{index}")
    elif value is not None and any(fnmatchcase(path, pattern) for pattern in PATHS):
        yield path, str(Path(value).absolute())
    elif value is not None and path in MODELS:
        yield path, resolve_path(value)
    else:
        yield path, value


def _delete_file(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be deleted ({error.strerror or error})") from None


def _num_steps(config: RunConfig) -> int:
    return sum(stage.steps for stage in config.stage)


def _lines(differences: dict[str, tuple[Any, Any]]) -> list[str]:
    return [
        f"{key} was {_show(old)} and is {_show(new)}" for key, (old, new) in differences.items()
    ]


def _in_words(differences: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(_lines(differences))


def _show(value: Any) -> str:
    return "unset" if value is None else str(value)
