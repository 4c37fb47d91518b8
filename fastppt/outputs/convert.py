"""From one form of a LoRA file to another, bit for bit."""

from __future__ import annotations

import logging
from pathlib import Path

from fastppt.errors import UserError
from fastppt.outputs.adapters import DTYPES, FORMS, Form
from fastppt.outputs.lora_files import find_lora_file
from fastppt.outputs.lora_forms import read_lora, write_lora

SUFFIX = ".safetensors"

logger = logging.getLogger(__name__)


def convert(source: Path, form: str, output: Path | None, dtype: str | None) -> Path:
    """Write a LoRA in another form; tensors, alphas and metadata stay what they are.

    What a file says of ranks and alphas in its form's own place (``lora_adapter_metadata``,
    ``adapter_config.json``) is written anew in the other form's.

    Args:
        source: A LoRA file, the folder of a run, or a folder that peft saved.
        form: One of `FORMS`.
        output: Where to; None takes the source's name with the form's, beside it.
        dtype: Type of the tensors; None keeps theirs.

    Returns:
        The file, or the folder for peft.

    Raises:
        UserError: the source cannot be read, the form cannot hold it, or the output is there.
    """
    wanted = _form(form)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    file = find_lora_file(source)
    target = output or _default_output(file, wanted, dtype)
    if wanted != "peft" and target.suffix != SUFFIX:
        raise UserError(f"--output {target}: must end with {SUFFIX}")
    if target.exists():
        raise UserError(f"{target}: is there already; pass another --output")
    lora = read_lora(file)
    if dtype is not None:
        lora = lora.cast(DTYPES[dtype])
    try:
        write_lora(target, lora, wanted)
    except UserError as error:
        raise UserError(f"LoRA {file}: {error}") from None
    scaled = [one for one in lora.adapters.values() if one.alpha != one.rank]
    if wanted == "diffusers" and scaled:
        logger.warning(
            "LoRA %s: in %d of %d adapters alpha is not the rank; the diffusers form notes it in "
            "the metadata, where diffusers reads it and other programs do not",
            target,
            len(scaled),
            len(lora.adapters),
        )
    return target


def _form(name: str) -> Form:
    for form in FORMS:
        if form == name:
            return form
    raise UserError(f"--to {name}: must be one of {', '.join(FORMS)}")


def _default_output(file: Path, form: Form, dtype: str | None) -> Path:
    stem = file.absolute().name.removesuffix(SUFFIX)
    ending = "" if dtype is None else f"-{dtype}"
    return file.absolute().parent / f"{stem}-{form}{ending}{'' if form == 'peft' else SUFFIX}"
