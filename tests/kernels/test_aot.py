import importlib.util
import os
import subprocess
import sys

import pytest

from fastppt_kernels import aot
from fastppt_kernels.launch import KernelConfiguration

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

FAULTY = """
import triton
import triton.language as tl


@triton.jit
def does_not_compile_kernel(out_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr, no_such_name)


@triton.jit
def spilling_kernel(out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    values = tl.load(out_ptr + offsets)
    tl.debug_barrier()
    tl.store(out_ptr + SIZE + offsets, values)
    tl.debug_barrier()
    tl.store(out_ptr + 2 * SIZE + offsets, values * tl.load(out_ptr))


@triton.jit
def square_kernel(out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tile = tl.load(out_ptr + offsets)
    tl.store(out_ptr + offsets, tl.dot(tile, tile, input_precision="ieee"))
"""


@pytest.fixture
def faulty(tmp_path):
    """Return a module of kernels that must not pass."""
    path = tmp_path / "faulty_kernels.py"
    path.write_text(FAULTY)
    specification = importlib.util.spec_from_file_location("faulty_kernels", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def configuration(kernel, size, **options):
    return KernelConfiguration(
        "planted",
        kernel,
        {"out_ptr": "*fp32", "SIZE": "constexpr"},
        {"SIZE": size},
        **options,
    )


def test_a_kernel_compiles_for_two_targets(capsys):
    given = ["--targets", "sm90,gfx942", "--kernels", "weighted_sum"]
    assert aot.main(given) == 0
    header, *rows, _, last = capsys.readouterr().out.splitlines()
    for column in ("kernel", "target", "registers", "spills", "shared", "tensor cores", "binary"):
        assert column in header
    assert len(rows) == 4
    assert [row.split("  ")[0] for row in rows] == ["weighted_sum"] * 4
    assert last == "4 compiled, 0 red"


def test_every_operation_lists_its_kernels():
    names = {configuration.name for configuration in aot.every_configuration()}
    assert {"anchor_penalty", "weighted_sum", "lora_gram", "lora_reduce", "lora_apply"} <= names


def test_signatures_name_the_arguments_in_order():
    for given in aot.every_configuration():
        assert list(given.signature) == given.kernel.arg_names, given.name
        constexprs = {name for name, kind in given.signature.items() if kind == "constexpr"}
        assert constexprs == set(given.constexprs), given.name


def run_with(monkeypatch, capsys, *configurations, targets="sm90"):
    monkeypatch.setattr(aot, "every_configuration", lambda: list(configurations))
    status = aot.main(["--targets", targets])
    return status, capsys.readouterr().out


def test_a_failed_compile_is_red(monkeypatch, capsys, faulty):
    planted = configuration(faulty.does_not_compile_kernel, 16)
    status, out = run_with(monkeypatch, capsys, planted)
    assert status == 1
    assert "no_such_name" in out


def test_a_spill_is_red(monkeypatch, capsys, faulty):
    planted = configuration(faulty.spilling_kernel, 16384, num_warps=1)
    status, out = run_with(monkeypatch, capsys, planted)
    assert status == 1
    assert "spills" in out.splitlines()[1]


def test_spills_are_read_from_amd_assembly():
    assembly = """
    .group_segment_fixed_size: 1024
    .sgpr_spill_count: 1
    .vgpr_count:     256
    .vgpr_spill_count: 2
    """
    assert aot._read_amdgcn(assembly) == (256, 12, 1024)


def test_shared_memory_beyond_the_target_is_red(monkeypatch, capsys, faulty):
    planted = configuration(faulty.square_kernel, 32)
    assert run_with(monkeypatch, capsys, planted)[0] == 0
    monkeypatch.setitem(aot.TARGETS, "sm90", aot.Target("cuda", 90, 32, 1024))
    status, out = run_with(monkeypatch, capsys, planted)
    assert status == 1
    assert "of shared memory, sm90 has 1024" in out


def test_tf32_where_float32_was_asked_for_is_red(monkeypatch, capsys, faulty):
    status, out = run_with(
        monkeypatch, capsys, configuration(faulty.square_kernel, 64), targets="sm100"
    )
    assert status == 1
    assert "computes in tf32" in out


@pytest.mark.parametrize("arguments", [["--targets", "sm75"], ["--kernels", "nothing"]])
def test_wrong_arguments_are_named(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        aot.main(arguments)
    assert stop.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_the_command_refuses_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "fastppt_kernels.aot", "--targets", "sm90"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert "TRITON_INTERPRET" in run.stderr
