"""The adapters of earlier steps, in folders that diffusers and `fastppt generate` can load."""

from __future__ import annotations

import shutil
from pathlib import Path

from fastppt.families.base import Family
from fastppt.outputs.files import rename
from fastppt.outputs.lora_files import DIFFUSERS_FILE, write_diffusers_file
from fastppt.trainables.lora import LoraAdapters


def save_checkpoint(folder: Path, family: Family, adapters: LoraAdapters, save_dtype: str) -> None:
    """Write the adapters into a folder that is whole or not there.

    Args:
        folder: The checkpoint's folder; it is written aside and renamed.
        family: Whose network the adapters belong to.
        adapters: What to save.
        save_dtype: Type of the file's tensors, as in the configuration.
    """
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    write_diffusers_file(aside / DIFFUSERS_FILE, family, adapters, save_dtype)
    rename(aside, folder)
