"""Compile every kernel for every target without a GPU: python -m fastppt_kernels.aot.

Prints one row for each configuration that the launchers can choose, and each target: registers,
spilled bytes, shared memory, tensor-core instructions, size of the binary. Exit status 1 on a
spill, a failed compile, shared memory beyond the target's, or products in tf32: Triton 3.6 and 3.7
take it for tiles of 64 rows on sm100 even where ``input_precision="ieee"`` is asked for.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastppt_kernels.launch import KernelConfiguration, is_interpreted

# Modules whose kernel_configurations() lists what their launchers can choose.
OPERATIONS = (
    "fastppt_kernels.adaptive_denoising.launch",
    "fastppt_kernels.anchor_penalty.op",
    "fastppt_kernels.anchored_adamw.configurations",
    "fastppt_kernels.attention_alignment.configurations",
    "fastppt_kernels.feature_alignment.launch",
    "fastppt_kernels.lora_anchor_penalty.op",
)


@dataclass(frozen=True)
class Target:
    """A kind of GPU: what Triton calls it, and the shared memory that a program may have."""

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int


TARGETS = {
    # CUDA C++ Programming Guide, compute capabilities: shared memory per thread block, opt-in.
    "sm80": Target("cuda", 80, 32, 163 * 1024),
    "sm90": Target("cuda", 90, 32, 227 * 1024),
    "sm100": Target("cuda", 100, 32, 227 * 1024),
    # CDNA 3: local data share of a compute unit.
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}
# Truncated operands: tf32 of NVIDIA's, xf32 of AMD's tensor cores.
TF32 = re.compile(r"tf32|_xf32")
TENSOR_CORES = re.compile(r"\b(?:w?g?mma\.\S*sync|wgmma\.mma|tcgen05\.mma|v_s?mfma)")


@dataclass(frozen=True)
class Row:
    """What one configuration became on one target; ``error`` is empty where all is well."""

    configuration: KernelConfiguration
    target: str
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    tensor_cores: bool = False
    binary_bytes: int = 0
    error: str = ""

    def columns(self) -> tuple[str, ...]:
        """Return the row as text."""
        constexprs = ", ".join(
            f"{name}={value}" for name, value in self.configuration.constexprs.items()
        )
        names = (self.configuration.name, f"{constexprs}, warps={self.configuration.num_warps}")
        if self.binary_bytes == 0:
            return (*names, self.target, "-", "-", "-", "-", "-", self.error)
        return (
            *names,
            self.target,
            str(self.registers),
            str(self.spilled_bytes),
            str(self.shared_bytes),
            "yes" if self.tensor_cores else "no",
            str(self.binary_bytes),
            self.error,
        )


HEADER = (
    "kernel",
    "configuration",
    "target",
    "registers",
    "spills (bytes)",
    "shared (bytes)",
    "tensor cores",
    "binary (bytes)",
    "error",
)


def every_configuration() -> list[KernelConfiguration]:
    """Return the configurations of all operations."""
    modules = [importlib.import_module(name) for name in OPERATIONS]
    return [configuration for m in modules for configuration in m.kernel_configurations()]


def compile_configuration(configuration: KernelConfiguration, target_name: str) -> Row:
    """Compile one configuration for one target, and read off what it needs.

    Args:
        configuration: What to compile. Pointers are taken to be multiples of 16 bytes, as what
            PyTorch allocates is.
        target_name: One of TARGETS.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = TARGETS[target_name]
    pointers = [i for i, t in enumerate(configuration.signature.values()) if t.startswith("*")]
    source = ASTSource(
        configuration.kernel,
        configuration.signature,
        configuration.constexprs,
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    try:
        compiled = triton.compile(
            source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options
        )
        shared_bytes = int(compiled.metadata.shared)
        if target.backend == "cuda":
            registers, spilled_bytes = _read_cubin(compiled.asm["cubin"])
            assembly, binary = compiled.asm["ptx"], compiled.asm["cubin"]
        else:
            assembly, binary = compiled.asm["amdgcn"], compiled.asm["hsaco"]
            registers, spilled_bytes, shared_bytes = _read_amdgcn(assembly)
    # Whatever a compiler raises, from a syntax error to a crash of ptxas, is a red row.
    except Exception as error:
        # Triton marks the place with lines of carets.
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
        last = lines[-1] if lines else ""
        return Row(configuration, target_name, error=f"{type(error).__name__}: {last[:100]}")
    faults = []
    if spilled_bytes:
        faults.append(f"spills {spilled_bytes} bytes")
    if shared_bytes > target.shared_bytes:
        faults.append(
            f"{shared_bytes} bytes of shared memory, {target_name} has {target.shared_bytes}"
        )
    if TF32.search(assembly):
        faults.append("computes in tf32")
    return Row(
        configuration,
        target_name,
        registers,
        spilled_bytes,
        shared_bytes,
        TENSOR_CORES.search(assembly) is not None,
        len(binary),
        "; ".join(faults),
    )


def _read_cubin(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread and the bytes it spills, from the binary itself.

    A Triton kernel has no local arrays: its stack and local memory are what was spilled.
    """
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _read_amdgcn(assembly: str) -> tuple[int, int, int]:
    """Return vector registers, spilled bytes and shared memory from the assembly's metadata.

    A spilled vector register is 4 bytes for each of 64 lanes, counted here for one lane; so is a
    spilled scalar register, which goes to a lane of a vector register.
    """

    def read(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", assembly)
        assert found is not None, f"no .{key} in the assembly"
        return int(found.group(1))

    spilled = read("vgpr_spill_count") + read("sgpr_spill_count")
    return read("vgpr_count"), 4 * spilled, read("group_segment_fixed_size")


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows in columns."""
    table = [HEADER, *[row.columns() for row in rows]]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEADER))]
    for line in table:
        cells = zip(line, widths, strict=True)
        print("  ".join(cell.ljust(width) for cell, width in cells).rstrip())


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, and return the exit status.

    Args:
        arguments: The command line; None: that of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m fastppt_kernels.aot", description=__doc__)
    parser.add_argument(
        "--targets",
        default=",".join(TARGETS),
        help="comma-separated, of " + ", ".join(TARGETS) + " (default: all)",
    )
    parser.add_argument(
        "--kernels", default="", help="only kernels with this in their name (default: all)"
    )
    options: Any = parser.parse_args(arguments)
    names = options.targets.split(",")
    for name in names:
        if name not in TARGETS:
            parser.error(f"--targets: got {name}, want some of {', '.join(TARGETS)}")
    if is_interpreted():
        parser.error("TRITON_INTERPRET is set: there is nothing to compile. Unset it")
    configurations = [c for c in every_configuration() if options.kernels in c.name]
    if not configurations:
        parser.error(f"--kernels: no kernel has {options.kernels} in its name")
    rows = [compile_configuration(c, name) for c in configurations for name in names]
    print_table(rows)
    red = [row for row in rows if row.error]
    print(f"\n{len(rows)} compiled, {len(red)} red")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
