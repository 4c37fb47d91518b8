"""How a step runs: eager, or with each transformer block compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig

import torch

from fastppt.config import Engine
from fastppt.errors import UserError
from fastppt.families.base import Family

WHY_AUTO_IS_EAGER = "one run of a few hundred steps hardly repays a cold compilation"


def resolve_engine(engine: Engine) -> Engine:
    """Return the engine that ``auto`` stands for.

    It is eager everywhere: one run of a few hundred steps hardly repays a cold compilation.
    """
    return "eager" if engine == "auto" else engine


def engines(device: torch.device) -> dict[Engine, str | None]:
    """Return every engine, and why it cannot be used on a device; None if it can."""
    return {"eager": None, "compile": why_not_compile(device)}


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


def prepare_engine(engine: Engine, family: Family) -> None:
    """Make the family's network ready to run steps under a resolved engine.

    ``compile`` is regional: each repeated block is compiled by itself, which takes a fraction of
    the time of the whole network and, unlike the whole network under Inductor on the CPU, gives
    right adapter gradients.

    Raises:
        UserError: the engine cannot be used on the family's device.
    """
    if engine != "compile":
        return
    reason = why_not_compile(family.device)
    if reason is not None:
        raise UserError(f"engine compile: {reason}. Pass --engine eager to do without")
    # Base and tuned passes, and the batch shapes of training and of sampling, are each one variant.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    blocks = [
        module
        for module in family.network.modules()
        if type(module).__name__ in family.repeated_blocks
    ]
    assert blocks, f"{family.name} names no block of its network in repeated_blocks"
    for block in blocks:
        block.compile()


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
