"""What there is on this machine, and whether a training could start on it.

Finding is apart from printing. Nothing that can be missing or broken is imported at the top.
"""

from __future__ import annotations

import platform
import re
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from fastppt import __version__
from fastppt.config import ModelConfig, RunConfig
from fastppt.config_types import Engine
from fastppt.errors import UserError
from fastppt.forecast import checked, memory
from fastppt.machine import (
    Finding,
    disk,
    free_host_memory,
    gpus,
    host_memory,
    hub,
    size_in_words,
)

if TYPE_CHECKING:
    import torch

# Distributions that every run needs, and what one imports of each.
REQUIRED = {
    "torch": "torch",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "safetensors": "safetensors",
    "matplotlib": "matplotlib",
    "huggingface-hub": "huggingface_hub",
    "numpy": "numpy",
    "pillow": "PIL",
}
# Distributions that a run can do without, what one imports of each, and what is missing then.
OPTIONAL = {
    "triton": ("triton", "PyTorch computes what the kernels would; on a GPU no --engine compile"),
    "peft": (
        "peft",
        "no dora, loha, lokr, oft, boft, and diffusers' own load_lora_weights cannot read the LoRA "
        "files; fastppt can",
    ),
    "tensorboard": ("tensorboard", "no --tensorboard"),
    "xformers": ("xformers", "no --attention xformers"),
    "flash-attn": ("flash_attn", "no --attention flash"),
}
# Importing these takes a GPU; they are tried where attention backends are.
NOT_IMPORTED = ("xformers", "flash-attn")

COLORS = {"ok": "green", "note": "yellow", "problem": "red"}

Report = dict[str, list[Finding]]
"""Findings by the title of their section."""


def examine(config: RunConfig) -> Report:
    """Look at everything that a run with this configuration would need.

    Args:
        config: Its model may be unset; then no model is looked at.
    """
    report: Report = {"Packages": packages()}
    if _has_problem(report["Packages"]):
        return report
    from fastppt.families.loading import resolve_device, resolve_dtype

    report["Machine"] = [*gpus(), host_memory(), disk(config.output)]
    try:
        device = resolve_device(config.model.device)
    except UserError as error:
        report["Machine"].append(Finding("problem", "device", str(error)))
    if _has_problem(report["Machine"]):
        # The rest of the report is still worth having.
        device = resolve_device("cpu")
    dtype = resolve_dtype(config.model.precision, device)
    report[f"Training on {device}"] = [
        kernels(device),
        *precisions(config.model.precision, device),
        *engines(config.engine, device),
        *attention(config.model.attention, device, dtype),
    ]
    report["Models"] = [hub(), mini_models()]
    if config.model.path is not None:
        found = model(config.model, device, dtype)
        report[f"Model {config.model.path}"] = found
        if not _has_problem(found):
            report["Memory and disk of the run, predicted"] = memory(config, device, dtype)
    report["Run"] = run_settings(config)
    return {title: findings for title, findings in report.items() if findings}


def can_train(report: Report) -> bool:
    """Say whether nothing in the report keeps a training from starting."""
    return not any(_has_problem(findings) for findings in report.values())


def print_report(report: Report, console: Console) -> None:
    """Print the report, one finding a line, and the verdict."""
    width = max(len(finding.what) for findings in report.values() for finding in findings)
    for title, findings in report.items():
        console.print(Text(title, style="bold"), soft_wrap=True)
        for finding in findings:
            mark = Text(f"  {finding.level:<8}", style=COLORS[finding.level])
            line = mark.append(f"{finding.what:<{width}}  {finding.text}", style="default")
            console.print(line, soft_wrap=True)
    verdict = "Training can start." if can_train(report) else "Training could not start."
    console.print(Text(verdict, style="green" if can_train(report) else "red"))


def packages() -> list[Finding]:
    """Return Python, fastppt, and each library: its version, or what is wrong with it."""
    required = [_required(name, module) for name, module in REQUIRED.items()]
    found = [
        Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}"),
        *required,
        *(_optional(name, *about) for name, about in OPTIONAL.items()),
    ]
    # With a library missing, its own finding says more than the trainer's failure to import it.
    if all(finding.level == "ok" for finding in required):
        error = _import_error("fastppt.training.loop")
        text = __version__ if error is None else f"{__version__} cannot be imported: {error}"
        found.append(Finding("ok" if error is None else "problem", "fastppt", text))
    return [*found, kernels_package()]


def kernels_package() -> Finding:
    """Return whether the fastppt_kernels that is imported is the one that fastppt brings.

    They are a distribution of their own as well, with the same files: where both are installed, the
    later one has written over the other, and removing one takes the files of both.
    """
    root = Path(__file__).resolve().parents[1]
    spec = find_spec("fastppt_kernels")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).resolve().parent
    own = [root / "fastppt_kernels", root / "kernels" / "fastppt_kernels"]
    again = f"pip install --force-reinstall --no-deps fastppt=={__version__}"
    if folder is None:
        text = f"not there: an uninstalled fastppt-kernels has taken fastppt's along; {again}"
        return Finding("problem", "fastppt_kernels", text)
    version = _other_kernels(own)
    if version is None and folder in own:
        return Finding("ok", "fastppt_kernels", f"fastppt's own, in {folder}")
    if version is None:
        text = f"imported from {folder}, not from {root} as fastppt: take it off PYTHONPATH"
        return Finding("problem", "fastppt_kernels", text)
    mend = "pip uninstall fastppt-kernels" + (f", then {again}" if folder == own[0] else "")
    text = (
        f"fastppt-kernels {version} is installed beside fastppt {__version__}, which brings the "
        f"package too; imported is {folder}. {mend}"
    )
    return Finding("note" if version == __version__ else "problem", "fastppt_kernels", text)


def kernels(device: torch.device) -> Finding:
    """Return who computes what fastppt has kernels for."""
    if device.type == "cpu":
        return Finding("ok", "kernels", "PyTorch, as always on the CPU")
    if find_spec("triton") is None:
        return Finding("note", "kernels", "PyTorch; with triton installed, fastppt's own kernels")
    error = _import_error("triton")
    if error is not None:
        return Finding("problem", "kernels", f"triton cannot be imported: {error}; reinstall it")
    return Finding("ok", "kernels", "fastppt's own, by Triton")


def precisions(chosen: str, device: torch.device) -> list[Finding]:
    """Return each precision: whether a small network computes in it, forward and backward."""
    import torch

    from fastppt.families.loading import PRECISIONS, resolve_dtype

    taken = PRECISIONS[resolve_dtype(chosen, device)]
    why = "auto takes it" if chosen == "auto" else "chosen"
    found = []
    for dtype, name in PRECISIONS.items():
        reason = None
        try:
            network = torch.nn.Conv2d(4, 4, 3, device=device, dtype=dtype)
            network(torch.ones(1, 4, 8, 8, device=device, dtype=dtype)).sum().backward()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
        emulated = dtype == torch.bfloat16 and device.type == "cuda"
        if reason is None and emulated and not torch.cuda.is_bf16_supported(False):
            found.append(Finding("note", name, "emulated: this GPU has no bf16; pass fp16"))
        else:
            found.append(_choice(name, reason, name == taken, why))
    return found


def engines(chosen: Engine, device: torch.device) -> list[Finding]:
    """Return each engine: usable, or why not; and which one is taken."""
    from fastppt.training.engine import engines, resolve_engine, why_auto

    taken = resolve_engine(chosen, device)
    why = f"auto takes it: {why_auto(device)}" if chosen == "auto" else "chosen"
    return [
        _choice(f"engine {name}", reason, name == taken, why)
        for name, reason in engines(device).items()
    ]


def attention(chosen: str, device: torch.device, dtype: torch.dtype) -> list[Finding]:
    """Return each attention backend: usable, or why not; and which one is taken."""
    from fastppt.families.backends import attention_backends

    return [
        _choice(f"attention {name}", reason, name == chosen, "chosen")
        for name, reason in attention_backends(device, dtype).items()
    ]


def mini_models() -> Finding:
    """Return the names of the embedded models."""
    from fastppt.families.names import MINI_MODELS, WORLD_MODEL

    others = " and ".join(name for name in MINI_MODELS if name != WORLD_MODEL)
    return Finding("ok", "embedded", f"{WORLD_MODEL} (trained), {others} (of random weights)")


def model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> list[Finding]:
    """Return what the model is and whether its weights fit, without loading it.

    Args:
        config: Which model, from where; its path is set.
        device: Where it would train.
        dtype: Of the network and the text encoders; the VAE takes float32 at least.
    """
    from fastppt.families.loading import detect_family
    from fastppt.families.weights import count_weights

    try:
        family = detect_family(config)
        weights = count_weights(config, family)
    except UserError as error:
        return [Finding("problem", "model", str(error))]
    found = [Finding("ok", "family", family)]
    if weights is None:
        text = "not in the cache yet: `fastppt train` downloads it; its size is known then"
        return [*found, Finding("note", "weights", text)]
    need = weights.num_bytes(dtype)
    parts = ", ".join(f"{name} {size_in_words(num_bytes)}" for name, num_bytes in need.items())
    total = sum(need.values())
    text = f"{size_in_words(total)} in {str(dtype).removeprefix('torch.')} ({parts})"
    found.append(Finding("ok", "weights", text))
    if device.type == "cuda":
        import torch

        found.append(_fit("GPU memory", total, torch.cuda.mem_get_info(device)[0]))
    found.append(_fit("memory", total, free_host_memory()))
    return found


def run_settings(config: RunConfig) -> list[Finding]:
    """Return what would stop the run that is asked for, beside its machine and its model."""
    from fastppt.config_io import check_recipe_fits
    from fastppt.families.loading import detect_family
    from fastppt.outputs.folder import check_output
    from fastppt.outputs.metrics import check_tensorboard
    from fastppt.outputs.results import check_libraries

    found = []
    if config.output is not None:
        text = f"{config.output} can be written"
        found.append(checked("output", text, lambda: check_output(config, overwrite=True)))
    if config.tensorboard:
        found.append(checked("curves", "TensorBoard is there", check_tensorboard))
    found.append(checked("results", "what writes them is there", lambda: check_libraries(config)))
    if config.recipe is not None and config.model.path is not None:
        try:
            family = detect_family(config.model)
        except UserError:
            # The model's own section says so.
            return found
        text = f"{config.recipe} is for {family}"
        found.append(checked("recipe", text, lambda: check_recipe_fits(config, family)))
    return found


def _has_problem(findings: list[Finding]) -> bool:
    return any(finding.level == "problem" for finding in findings)


def _required(name: str, module: str) -> Finding:
    if find_spec(module) is None:
        return Finding("problem", name, f"not installed: pip install '{_requirement(name)}'")
    error = _import_error(module)
    if error is not None:
        return Finding("problem", name, f"cannot be imported: {error}")
    version, wanted = _version_of(name), _requirement(name)
    if not _meets(version, wanted):
        return Finding("problem", name, f"{version} is too old: pip install '{wanted}'")
    return Finding("ok", name, version)


def _optional(name: str, module: str, without: str) -> Finding:
    if find_spec(module) is None:
        return Finding("note", name, f"not installed: {without}")
    error = None if name in NOT_IMPORTED else _import_error(module)
    if error is not None:
        return Finding("note", name, f"cannot be imported: {error}; {without}")
    return Finding("ok", name, _version_of(name))


def _choice(what: str, reason: str | None, is_taken: bool, why: str) -> Finding:
    """Return one of several ways; one that is taken and cannot be used is a problem."""
    if reason is not None:
        return Finding("problem" if is_taken else "note", what, f"not usable: {reason}")
    return Finding("ok", what, f"usable; {why}" if is_taken else "usable")


def _fit(what: str, need: int, free: int) -> Finding:
    numbers = f"{size_in_words(need)} of weights, {size_in_words(free)} free"
    if need > free:
        return Finding("problem", what, f"the model does not fit: {numbers}")
    return Finding("ok", what, f"the model fits: {numbers}")


def _other_kernels(own: list[Path]) -> str | None:
    """Return the version of an installed fastppt-kernels; None if there is none.

    What a build has left in the checkout is no installation.
    """
    try:
        found = metadata.distribution("fastppt-kernels")
    except metadata.PackageNotFoundError:
        return None
    is_left = Path(str(found.locate_file("fastppt_kernels"))).resolve() == own[1]
    return None if is_left else found.version


def _version_of(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _meets(version: str, wanted: str) -> bool:
    """Say whether a version meets a demand such as `torch>=2.11`."""
    minimum = wanted.partition(">=")[2]
    release = re.match(r"[\d.]+", version)
    if not minimum or release is None:
        return True
    return [int(n) for n in release[0].strip(".").split(".")] >= [
        int(n) for n in minimum.split(".")
    ]


def _requirement(name: str) -> str:
    """Return what fastppt demands of a distribution, such as `torch>=2.11`."""
    try:
        demands = metadata.requires("fastppt") or []
    except metadata.PackageNotFoundError:
        demands = []
    return next((d for d in demands if re.split(r"[^\w-]", d)[0] == name), name)


def _import_error(module: str) -> str | None:
    """Return why a module cannot be imported, in one line; None if it can."""
    try:
        import_module(module)
    except Exception as error:  # Whatever a broken installation raises is the finding.
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None
