"""The run that files are of: found beside them."""

from __future__ import annotations

from pathlib import Path

from fastppt.config import RunConfig
from fastppt.config_io import build_config
from fastppt.errors import UserError
from fastppt.outputs.lora_forms import is_peft_folder

CONFIG_FILE = "config.toml"


def run_config_of(path: Path) -> RunConfig | None:
    """Return the configuration of the run that files are of; None where there is none.

    Args:
        path: A file, the folder of a run or of a checkpoint, or a folder of peft's beside them.

    Raises:
        UserError: a file of that name is no configuration of a run.
    """
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    beside = [folder.parent] if is_peft_folder(folder) else []
    # Two levels up from OUT/checkpoints/step-N.
    for place in (folder, *beside, folder.parent.parent):
        if (place / CONFIG_FILE).is_file():
            try:
                return build_config(file=place / CONFIG_FILE)
            except UserError as error:
                raise UserError(
                    f"{error}\nIt lies where the configuration of the LoRA's run is looked for; "
                    "if it is none, move the LoRA to another folder"
                ) from None
    return None
