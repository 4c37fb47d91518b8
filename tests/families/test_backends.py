"""Every attention backend computes what torch's own does, or says why it cannot be had here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families import backends
from fastppt.families.backends import attention_backends, resolve_attention, why_not
from fastppt.families.loading import load_family

CPU = torch.device("cpu")

# What the packages compute, with their own layout [B, Q, H, D] and their own demands. They keep
# what they were given.
STAND_IN = """
import torch

given = []


def _attend(query, key, value, bias):
    given.append((query, key, value, bias))
    for tensor in (query, key, value):
        assert tensor.ndim == 4 and tensor.stride(-1) == 1
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    if bias is not None:
        assert bias.shape == scores.shape and bias.dtype == query.dtype and bias.stride(-1) == 1
        align = 16 // bias.element_size()
        assert all(stride % align == 0 for stride in bias.stride()[:-1])
        scores = scores + bias
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)
"""
XFORMERS = (
    STAND_IN
    + """

def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
    return _attend(query, key, value, attn_bias)
"""
)
FLASH = (
    STAND_IN
    + """

def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    return _attend(q, k, v, None)
"""
)
BROKEN = """
def memory_efficient_attention(query, key, value, attn_bias=None):
    raise NotImplementedError("No operator found for `forward` with inputs:\\n  query: ...")
"""
UNLOADABLE = 'raise ImportError("libcudart.so.13: cannot open shared object file")'

Install = Callable[[str, str], ModuleType]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return an installer of stand-ins, which also takes the CPU for a GPU."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    here = backends._not_here
    monkeypatch.setattr(
        backends, "_not_here", lambda package, how, device: here(package, how, torch.device("cuda"))
    )

    def write(module: str, source: str) -> None:
        path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        if path.parent != tmp_path:
            (path.parent / "__init__.py").touch()
        importlib.invalidate_caches()

    yield write
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("xformers", "flash_attn"):
            del sys.modules[name]


def draw(num_keys: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as the processors make them: views of [B, N, H * D]."""
    generator = torch.Generator().manual_seed(0)
    shape = ((2, 9, 3 * 8), (2, num_keys, 3 * 8), (2, num_keys, 3 * 8))
    packed = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shape]
    query, key, value = (p.unflatten(-1, (3, 8)).transpose(1, 2) for p in packed)
    return query, key, value


@pytest.mark.parametrize(
    ("name", "module", "source"),
    [("xformers", "xformers.ops", XFORMERS), ("flash", "flash_attn", FLASH)],
)
@pytest.mark.parametrize("num_keys", [9, 5])
def test_package_computes_what_sdpa_does_without_a_copy(
    install: Install, name: str, module: str, source: str, num_keys: int
) -> None:
    install(module, source)
    attend = resolve_attention(name, CPU, torch.bfloat16)
    given = sys.modules[module].given
    given.clear()
    leaves = [tensor.detach().requires_grad_() for tensor in draw(num_keys)]
    output = attend(*leaves, None)
    sdpa = resolve_attention("sdpa", CPU, torch.float64)(*leaves, None)
    assert output.shape == (2, 3, 9, 8)
    assert (output - sdpa).abs().max() < 1e-12
    weights = torch.randn(output.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((output * weights).sum(), leaves)
    expected = torch.autograd.grad((sdpa * weights).sum(), leaves)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-12
    for seen, leaf in zip(given[0][:3], leaves, strict=True):
        assert seen.data_ptr() == leaf.data_ptr()
        assert seen.is_contiguous() and seen.shape == leaf.transpose(1, 2).shape


@pytest.mark.parametrize("num_keys", [5, 8, 9])
@pytest.mark.parametrize("mask_shape", [(2, 3, 1), (1, 1, 9)])
def test_xformers_gets_a_mask_as_it_wants_it(
    install: Install, num_keys: int, mask_shape: tuple[int, ...]
) -> None:
    install("xformers.ops", XFORMERS)
    attend = resolve_attention("xformers", CPU, torch.float32)
    query, key, value = draw(num_keys)
    mask = torch.randn(*mask_shape, num_keys, dtype=torch.float64)
    sdpa = resolve_attention("sdpa", CPU, torch.float64)(query, key, value, mask)
    assert (attend(query, key, value, mask) - sdpa).abs().max() < 1e-12


def test_flash_refuses_a_mask(install: Install) -> None:
    install("flash_attn", FLASH)
    attend = resolve_attention("flash", CPU, torch.bfloat16)
    query, key, value = draw(5, torch.bfloat16)
    with pytest.raises(UserError, match="masks attention, which flash-attn cannot do"):
        attend(query, key, value, torch.zeros(2, 3, 9, 5))


@pytest.mark.parametrize(
    ("name", "package", "install_command"),
    [
        ("xformers", "xformers", 'pip install "fastppt[xformers]"'),
        ("flash", "flash_attn", "pip install flash-attn --no-build-isolation"),
    ],
)
def test_what_is_not_installed_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, install_command: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as error:
        load_family(ModelConfig(path="mini-sdxl", device="cpu", attention=name))
    message = str(error.value)
    assert message.startswith(f"model.attention {name}: not installed ({install_command})")
    assert "needs a GPU, and the device is cpu" in message
    assert "--attention sdpa" in message


def test_flash_needs_halves_and_a_new_enough_gpu(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("flash_attn", FLASH)
    assert why_not("flash", CPU, torch.bfloat16) is None
    assert why_not("flash", CPU, torch.float16) is None
    reason = why_not("flash", CPU, torch.float32)
    assert reason == "computes in bf16 or fp16, not in float32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = why_not("flash", torch.device("cuda"), torch.float16)
    assert reason == "needs a GPU of compute capability 8.0, this one has 7.5"


def test_xformers_does_not_compute_in_float64(install: Install) -> None:
    install("xformers.ops", XFORMERS)
    assert why_not("xformers", CPU, torch.float32) is None
    assert why_not("xformers", CPU, torch.float64) == (
        "computes in bf16, fp16 or fp32, not in float64"
    )


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (BROKEN, "No operator found for `forward` with inputs:"),
        (UNLOADABLE, "libcudart.so.13: cannot open shared object file"),
    ],
)
def test_package_that_is_there_and_does_not_run_is_refused(
    install: Install, source: str, reason: str
) -> None:
    install("xformers.ops", source)
    with pytest.raises(UserError) as error:
        resolve_attention("xformers", CPU, torch.float32)
    assert f"is installed but does not run here ({reason}); reinstall it" in str(error.value)


def test_packages_are_imported_only_when_chosen(install: Install) -> None:
    install("xformers.ops", XFORMERS)
    install("flash_attn", FLASH)
    resolve_attention("sdpa", CPU, torch.float32)
    resolve_attention("flash", CPU, torch.bfloat16)
    assert "flash_attn" in sys.modules and "xformers" not in sys.modules


def test_every_backend_is_listed_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("xformers", "flash_attn"):
        monkeypatch.setitem(sys.modules, package, None)
    listed = attention_backends(CPU, torch.float32)
    assert listed.pop("sdpa") is None
    assert sorted(listed) == ["flash", "xformers"]
    assert all(reason and "pip install" in reason for reason in listed.values())


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "package"), [("xformers", "xformers"), ("flash", "flash_attn")])
@pytest.mark.parametrize("head_dim", [40, 64, 160])
@pytest.mark.parametrize("num_keys", [77, 256])
def test_installed_package_agrees_with_sdpa(
    name: str, package: str, head_dim: int, num_keys: int
) -> None:
    pytest.importorskip(package)
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    leaves = [
        torch.randn(
            2, num, 3 * head_dim, generator=generator, device=device, dtype=torch.bfloat16
        ).requires_grad_()
        for num in (256, num_keys, num_keys)
    ]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    outputs = []
    for attend, tensors in (
        (resolve_attention(name, device, torch.bfloat16), leaves),
        (resolve_attention("sdpa", device, torch.float64), exact),
    ):
        split = [t.unflatten(-1, (3, head_dim)).transpose(1, 2) for t in tensors]
        output = attend(split[0], split[1], split[2], None)
        gradients = torch.autograd.grad(output.float().square().sum(), tensors)
        outputs.append([output.double(), *(gradient.double() for gradient in gradients)])
    for ours, expected in zip(*outputs, strict=True):
        # bf16 keeps 8 bits of each operand and of the result.
        assert (ours - expected).norm() <= 2**-6 * expected.norm()
