"""What tests and benches share: tensors from a seed, comparisons, planted faults, host reads.

It needs torch and the standard library only, so that it works wherever the kernels do.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and not INTERPRETED

# What float32 arithmetic leaves of an update: 8 roundings, and a few more of a long sum.
UPDATE_TOLERANCE = 1e-6
# Elements of NaN before and after a guarded tensor.
GUARD_SIZE = 64

Shape = Sequence[int]

_HOST_READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    # torch.tensor(value): a copy from pageable host memory, which synchronises.
    torch.ops.aten.lift_fresh.default,
)


class ForbidHostReads(TorchDispatchMode):
    """A context in which reading a tensor's value on the host raises.

    On a GPU such a read synchronises, and a captured graph refuses it. The CPU hides it; this mode
    sees there too: ``.item()``, ``bool(tensor)``, ``float(tensor)``, ``nonzero``, ``torch.equal``,
    ``unique``, selection by a mask, and new tensors from Python values. It cannot see ``tolist``,
    ``numpy`` and ``cpu`` of a CPU tensor: those take ``torch.cuda.set_sync_debug_mode("error")``.

    Raises:
        AssertionError: At the read.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` unless it reads on the host."""
        assert func not in _HOST_READS, f"{func} reads a tensor's value on the host"
        if func is torch.ops.aten.index.Tensor:
            by_mask = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not by_mask, f"{func} by a mask reads the number of its elements on the host"
        return func(*args, **(kwargs or {}))


def draw_tensors(
    shapes: Sequence[Shape], *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Return normal values on the CPU, drawn in ``dtype``, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(shape), generator=generator, dtype=dtype) for shape in shapes]


def draw_denoising_arguments(
    num_samples: int,
    shape: Shape,
    dtype: torch.dtype,
    *,
    weights: bool = True,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Return the arguments of ``adaptive_denoising_loss``, by name, with 10 bins.

    Losses are about 0.1 and the base's 0.002 larger, with EMAs that give gammas from 0 to 0.9; bins
    1 and 7 were not seen yet. Samples lie in bins 3, 7, 3, 0, 6, 3, 9, 7, and so on: there are
    bins with several, with a first, and with none.

    Args:
        num_samples: B.
        shape: Of a sample.
        dtype: Of the predictions and the target; the rest is float32, or float64 for float64.
        weights: With ``sample_weight``.
        seed: The same values for the same.
        device: Where the tensors are.
    """
    loss, excess, num_bins = 0.1, 2e-3, 10
    sizes: Sequence[Shape] = [(num_samples, *shape)] * 3 + [
        (num_samples,),
        (num_bins,),
        (num_bins,),
    ]
    target, error, base_error, weight, base_ema, drift = draw_tensors(sizes, seed=seed)
    for drawn, wanted in ((error, loss), (base_error, loss + excess)):
        of_sample = drawn.flatten(1)
        of_sample *= (wanted / of_sample.square().mean(1, keepdim=True)).sqrt()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    base_ema = loss * (1 + 0.1 * base_ema)
    tuned_ema = base_ema - excess * drift
    base_ema[[1, 7]] = tuned_ema[[1, 7]] = torch.nan
    pattern = (3, 7, 3, 0, 6, 3, 9, 7)
    return {
        "prediction": (target + error).to(device, dtype),
        "base_prediction": (target + base_error).to(device, dtype),
        "target": target.to(device, dtype),
        "bins": torch.tensor([pattern[i % len(pattern)] for i in range(num_samples)]).to(device),
        "base_ema": base_ema.to(device, wide),
        "tuned_ema": tuned_ema.to(device, wide),
        "sample_weight": weight.abs().to(device, wide) if weights else None,
    }


def draw_lora_lists(
    pairs: Sequence[tuple[int, int, int, float]],
    weight: float,
    *,
    dtypes: Sequence[torch.dtype],
    drift: float,
    none_at: Sequence[int] = (),
    zero_grads: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Return the arguments of ``lora_anchor_penalty_``, by name.

    Args:
        pairs: (rank, in, out, scale) of each.
        weight: The anchor's weight.
        dtypes: Of the values, of the anchors and of the gradients.
        drift: The size of what the anchors differ from the values by; the values have size 1.
        none_at: The pairs without an anchor.
        zero_grads: Gradients of zeros, so that what is added to them is seen to the last bit.
        device: Where the tensors are.
    """
    downs = [(rank, width) for rank, width, _, _ in pairs]
    ups = [(out, rank) for rank, _, out, _ in pairs]
    shapes = downs + ups
    drawn = draw_tensors(shapes * 3)
    values, drifts, grads = (drawn[i * len(shapes) : (i + 1) * len(shapes)] for i in range(3))
    lists: dict[str, Any] = {"scales": [scale for *_, scale in pairs], "weight": weight}
    for side, places in (
        ("down", range(len(pairs))),
        ("up", range(len(pairs), 2 * len(pairs))),
    ):
        lists[f"{side}s"] = [values[i].to(device, dtypes[0]) for i in places]
        lists[f"anchor_{side}s"] = [
            None if pair in none_at else (values[i] + drift * drifts[i]).to(device, dtypes[1])
            for pair, i in enumerate(places)
        ]
        lists[f"{side}_grads"] = [
            (torch.zeros_like(grads[i]) if zero_grads else grads[i]).to(device, dtypes[2])
            for i in places
        ]
    return lists


def drop_lora_grads(lists: dict[str, Any]) -> dict[str, Any]:
    """Return what ``lora_anchor_penalty_reference`` takes of ``lora_anchor_penalty_``'s arguments.

    Reads a weight that is a tensor on the host.
    """
    kept = {name: value for name, value in lists.items() if not name.endswith("grads")}
    return kept | {"weight": float(lists["weight"])}


def make_arena(
    shapes: Sequence[Shape],
    *,
    alignment: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, list[Tensor]]:
    """Return a flat tensor of zeros and its views of ``shapes``.

    Args:
        shapes: Of the views, in their order; between two is what the alignment leaves.
        alignment: Elements that each view's start is a multiple of.
        dtype: Of the flat tensor.
        device: Where it is.
    """
    sizes = [prod(shape) for shape in shapes]
    rooms = [-(-size // alignment) * alignment for size in sizes]
    flat = torch.zeros(sum(rooms), dtype=dtype, device=device)
    pieces = zip(flat.split(rooms), sizes, shapes, strict=True)
    return flat, [piece[:size].view(tuple(shape)) for piece, size, shape in pieces]


class GuardedTensors:
    """Draws flat tensors that lie between elements of NaN.

    A read past a tensor's end shows in every sum, a write in ``check``.
    """

    def __init__(self, device: torch.device | str, seed: int = 0) -> None:
        self._device = device
        self._generator = torch.Generator().manual_seed(seed)
        self._guards: list[Tensor] = []

    def draw(self, size: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
        """Return ``size`` normal values; a shift of one element takes them off the alignment."""
        start = GUARD_SIZE + shift
        room = size + start + GUARD_SIZE
        buffer = torch.full((room,), torch.nan, dtype=dtype, device=self._device)
        self._guards += [buffer[:start], buffer[start + size :]]
        values = torch.randn(size, generator=self._generator)
        return buffer[start : start + size].copy_(values)

    def check(self) -> None:
        """Refuse a guard that was written.

        Raises:
            AssertionError: One holds a number.
        """
        for guard in self._guards:
            assert guard.isnan().all(), "memory beside a tensor was written"


def worst_error(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest ||given_i - wanted_i|| / ||wanted_i||, NaN if one is.

    Give updates, not values: an error hides in a value. Computed in the dtype of ``wanted``; 0
    where both are zero.
    """
    pairs = zip(given, wanted, strict=True)
    errors = [_relative((g.to(w) - w).norm(), w.norm()) for g, w in pairs]
    return torch.stack(errors).max().item()


def overall_error(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return ||given - wanted|| / ||wanted|| of all tensors together: updates, not values.

    Computed in the dtype of ``wanted``; 0 where both are zero.
    """
    pairs = zip(given, wanted, strict=True)
    difference = torch.cat([(g.to(w) - w).flatten() for g, w in pairs])
    return _relative(difference.norm(), torch.cat([w.flatten() for w in wanted]).norm()).item()


def _relative(difference: Tensor, wanted: Tensor) -> Tensor:
    return torch.where(difference == 0, difference, difference / wanted)


def check_added(
    given: Sequence[Tensor], old: Sequence[Tensor], updates: Sequence[Tensor], tolerance: float
) -> None:
    """Compare what was added to each tensor with ``updates``, by its norm.

    ||given_i - old_i - update_i|| <= tolerance * ||update_i|| + 1e-15 * ||old_i||

    Raises:
        AssertionError: One differs by more.
    """
    for index, (new, before, update) in enumerate(zip(given, old, updates, strict=True)):
        error = (new.double() - before.double() - update).norm()
        bound = tolerance * update.norm() + 1e-15 * before.double().norm()
        assert error <= bound, f"tensor {index}: its update is off by {error:.1e}, not {bound:.1e}"


def check_stored(
    given: Sequence[Tensor],
    old: Sequence[Tensor],
    wanted: Sequence[Tensor],
    *,
    num_ulps: float = 1.0,
    elementwise: bool = False,
) -> None:
    """Compare each element within ulps of the stored value and 1e-6 of the update.

    |given - wanted| <= num_ulps * eps * |wanted| + 1e-6 * max |wanted - old|

    Args:
        given: What was stored; ``eps`` is that of its dtype.
        old: What was there before.
        wanted: What should be there, in float64.
        num_ulps: 1/2, and a little for a tie, where the result is rounded once.
        elementwise: Allow 1e-6 of the element's own update, not of the tensor's largest.

    Raises:
        AssertionError: An element differs by more.
    """
    for index, (new, before, exact) in enumerate(zip(given, old, wanted, strict=True)):
        if not new.numel():
            continue
        exact = exact.to(new.device, torch.float64)
        update = (exact - before.to(exact)).abs()
        bound = num_ulps * torch.finfo(new.dtype).eps * exact.abs()
        # The last term lets a zero be a denormal.
        bound += UPDATE_TOLERANCE * (update if elementwise else update.max()) + 1e-30
        error = (new.double() - exact).abs()
        assert (error <= bound).all(), f"tensor {index}: off by up to {error.max():.1e}"


def load_mutant(path: str, faults: Sequence[tuple[str, str]], folder: Path) -> ModuleType:
    """Return the module at ``path`` with each (right, wrong) of ``faults`` replaced in its text.

    Args:
        path: A module's ``__file__``. Not written.
        faults: Pieces of its source and what stands there instead, in their order.
        folder: Where the mutant's source is kept: Triton reads it again.

    Raises:
        AssertionError: The source no longer holds a piece.
    """
    source = Path(path).read_text()
    for right, wrong in faults:
        assert right in source, f"{right!r} is no longer in {path}"
        source = source.replace(right, wrong)
    file = folder / "mutant.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location("mutant", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_in_interpreter(test_file: str, marks: str = "not gpu") -> None:
    """Run a test file's tests of these marks in Triton's interpreter, in a process of their own.

    Raises:
        AssertionError: One is red; with the end of the output.
    """
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--noconftest", "-m", marks, test_file],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(test_file).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]
