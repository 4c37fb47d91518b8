"""torch.compile: what it needs of the machine, what of the network it compiles, and its check.

The whole network under Inductor on the CPU (torch 2.13) has given right outputs and wrong adapter
gradients, so whole networks are checked before they train; blocks have never been found wrong.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable

import torch
from torch import Tensor

from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables.peft_tuners import PeftAdapters
from fastppt.trainables.trainables import Trainables
from fastppt.training.snapshot import Snapshot, written_tensors
from fastppt.training.step import Step, accumulate_gradients

# What adapters' values that start at zero are set to for the check; there they hide gradients.
TRIAL_UP = 0.01
# The loss scale of a float16 check: at the one that runs begin with, gradients may overflow.
TRIAL_LOSS_SCALE = 2.0**8
# Part of its norm that a gradient may be off where the pass compares with the base: small
# differences of large numbers, of which rounding to bfloat16 alone moves 0.33 (a mini model, beside
# float32). The wrong gradients that are known were off by 0.75 and more.
COMPARED_TOLERANCE = 0.5


def why_not_compile(device: torch.device) -> str | None:
    """Return what Inductor lacks for code that runs on a device; None if it lacks nothing.

    On the CPU it writes C++ with OpenMP, which a C++ compiler builds against Python's headers. On
    a GPU it writes Triton kernels, whose launchers a C compiler builds against the same headers.
    The compilers are run, on those headers alone.
    """
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            compiler = get_cpp_compiler()
        except InvalidCxxCompiler:
            return "needs a C++ compiler: install g++, or set CXX to another one"
        return _why_not_build([compiler, "-x", "c++", "-fopenmp"], ("Python.h", "omp.h"))
    from torch._dynamo.device_interface import get_interface_for_device
    from torch.utils._triton import has_triton_package

    if not has_triton_package():
        return "needs triton: pip install triton"
    try:
        get_interface_for_device(device.type).raise_if_triton_unavailable(device)
    except RuntimeError as error:
        return " ".join(str(error).split())
    c_compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if c_compiler is None:
        return "needs a C compiler: install gcc, or set CC to another one"
    return _why_not_build([c_compiler, "-x", "c"], ("Python.h",))


def compile_blocks(family: Family) -> None:
    """Compile each repeated block of the family's network by itself, when it is first called.

    That takes a fraction of the time of the whole network.
    """
    _allow_variants()
    blocks = [
        module
        for module in family.network.modules()
        if type(module).__name__ in family.repeated_blocks
    ]
    assert blocks, f"{family.name} names no block of its network in repeated_blocks"
    for block in blocks:
        block.compile()


def compile_network(family: Family) -> None:
    """Compile the family's network as one, when it is first called."""
    _allow_variants()
    family.network.compile()


def check_gradients(steps: Iterable[Step], trainables: Trainables) -> None:
    """Compare the gradients of a compiled pass with an eager one's, for each step.

    For every tensor that is trained: ||compiled - eager|| <= sqrt(eps) * ||eager||, eps that of the
    network's dtype: half of its digits, our choice. A tensor whose gradient is below sqrt(eps) of
    the largest one counts as that large. That is asked of a pass without the base; where objectives
    compare with it, a pass that does is other code, and is checked too, to `COMPARED_TOLERANCE`.
    Both passes of a pair have the same draws and the adapters' values, with `TRIAL_UP` for
    up-projections that are zero. Whatever the passes write is put back.

    Raises:
        UserError: a gradient differs by more; the worst one is named.
    """
    for step in steps:
        rounding = torch.finfo(step.family.dtype).eps ** 0.5
        _check_pass(step, trainables, rounding, with_base=False)
        if step.stage.objectives.need_base:
            _check_pass(step, trainables, COMPARED_TOLERANCE, with_base=True)


def _check_pass(step: Step, trainables: Trainables, tolerance: float, *, with_base: bool) -> None:
    snapshot = Snapshot(written_tensors(step), step.generators.values())
    try:
        eager, compiled = _trial_gradients(step, trainables, with_base=with_base)
    finally:
        snapshot.restore()
    floor = torch.finfo(step.family.dtype).eps ** 0.5 * max(
        gradient.norm().item() for gradient in eager.values()
    )
    errors = {
        name: ((compiled[name] - gradient).norm() / gradient.norm().clamp(min=floor)).item()
        for name, gradient in eager.items()
    }
    # A gradient that is not a number is the worst of all.
    worst = max(errors, key=lambda name: errors[name] if errors[name] >= 0 else torch.inf)
    if not errors[worst] <= tolerance:
        num_wrong = sum(not error <= tolerance for error in errors.values())
        raise UserError(
            f"compile_scope network: torch {torch.__version__} compiles wrong gradients on "
            f"{step.family.device}: {num_wrong} of {len(errors)} trained tensors differ from "
            f"eager ones, most of all that of {worst} (by {errors[worst]:.1e} of its norm; "
            f"{tolerance:.1e} is rounding); pass --set compile_scope=blocks"
        )


def _trial_gradients(
    step: Step, trainables: Trainables, *, with_base: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients of what is trained by name: eager ones, and compiled ones."""
    for name in step.stage.trainables.given:
        adapters = trainables.parts[name]
        if isinstance(adapters, LoraAdapters):
            for pair in adapters.pairs:
                pair.up.copy_(torch.where(pair.up == 0, TRIAL_UP, pair.up))
        elif isinstance(adapters, PeftAdapters):
            for tensor in adapters.tensors.values():
                tensor.copy_(torch.where(tensor == 0, TRIAL_UP, tensor))
    trainables.refresh()
    if step.loss_scale is not None:
        step.loss_scale.scale.fill_(TRIAL_LOSS_SCALE)
    trial = Snapshot(written_tensors(step), step.generators.values())
    with torch.compiler.set_stance("force_eager"):
        accumulate_gradients(step, with_base=with_base)
    eager = _gradients(trainables)
    trial.restore()
    accumulate_gradients(step, with_base=with_base)
    return eager, _gradients(trainables)


def _gradients(trainables: Trainables) -> dict[str, Tensor]:
    """Return copies of the gradients of all that is trained, by its place in the model."""
    copies = {
        arena.flat.untyped_storage().data_ptr(): arena.grad.clone()
        for arena in trainables.arenas.values()
    }
    return {
        name: copies[tensor.untyped_storage().data_ptr()].as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset()
        )
        for tensors in trainables.tensors.values()
        for name, tensor in tensors.items()
    }


def _allow_variants() -> None:
    # Base and tuned passes, and the batch shapes of training and of sampling, are each one variant.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # Or hooks that a later stage puts on layers within what is compiled would not be called.
    torch._dynamo.config.skip_nnmodule_hook_guards = False


def _why_not_build(command: list[str], headers: tuple[str, ...]) -> str | None:
    """Return why a compiler cannot build against the headers; None if it can."""
    source = "".join(f"#include <{header}>\n" for header in headers)
    include = sysconfig.get_path("include")
    try:
        built = subprocess.run(
            [*command, f"-I{include}", "-fsyntax-only", "-"],
            input=source,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        return f"the compiler {command[0]} cannot be run ({error.strerror})"
    if built.returncode == 0:
        return None
    missing = next((header for header in headers if f"{header}:" in built.stderr), None)
    if missing == "Python.h":
        return f"needs Python's headers ({include} has no Python.h): install python3-dev"
    lines = built.stderr.strip().splitlines() or [f"exit status {built.returncode}"]
    return f"the compiler {command[0]} does not work ({lines[0]})"
