"""What the operations check at the door, and the dtype they compute in."""

from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

# A tensor of a list, or None where the list may have holes; and the name the caller knows it by.
NamedLists = dict[str, Sequence[Tensor | None]]


def compute_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return float64 if any tensor is float64, else float32."""
    return torch.float64 if torch.float64 in {t.dtype for t in tensors} else torch.float32


def check_lengths(lists: dict[str, Sequence[object]]) -> None:
    """Raise ValueError unless all lists are as long as the first."""
    (first, wanted), *others = lists.items()
    for name, given in others:
        if len(given) != len(wanted):
            raise ValueError(
                f"{name}: got {len(given)} entries, want {len(wanted)}, one for each of {first}"
            )


def check_shapes(wanted_name: str, wanted: Sequence[Tensor], lists: NamedLists) -> None:
    """Raise ValueError unless each tensor has the shape of its partner in ``wanted``."""
    for name, tensors in lists.items():
        present = [i for i, tensor in enumerate(tensors) if tensor is not None]
        partners = wanted if len(present) == len(tensors) else [wanted[i] for i in present]
        given = [t for t in tensors if t is not None]
        # Not by lists of shapes: thousands of new objects wake the garbage collector.
        if all(map(Tensor.is_same_size, given, partners)):
            continue
        for index, tensor, partner in zip(present, given, partners, strict=True):
            if tensor.shape != partner.shape:
                raise ValueError(
                    f"{name}[{index}]: got shape {tuple(tensor.shape)}, "
                    f"want {tuple(partner.shape)}, the shape of {wanted_name}[{index}]"
                )


def check_tensors(lists: NamedLists, holes: Sequence[str] = ()) -> set[torch.dtype]:
    """Return the dtypes, or raise unless all are contiguous floating-point tensors on one device.

    Args:
        lists: The lists by name; an error names the list and the index.
        holes: Names of the lists in which None is allowed.

    Raises:
        ValueError: None outside ``holes``, or a tensor that is not as asked for.
    """
    given = {name: [t for t in tensors if t is not None] for name, tensors in lists.items()}
    every = [t for tensors in given.values() for t in tensors]
    # Thousands of tensors come here every step, so nothing takes a Python frame a tensor. Lists
    # are walked for an index on a fault only.
    kinds = {kind for tensors in given.values() for kind in _devices_and_dtypes(tensors)}
    dtypes = {dtype for _, dtype in kinds}
    if (
        all(len(given[name]) == len(lists[name]) for name in lists if name not in holes)
        and all(dtype.is_floating_point for dtype in dtypes)
        and len({device for device, _ in kinds}) <= 1
        and all(map(Tensor.is_contiguous, every))
    ):
        return dtypes
    device = every[0].device if every else None
    for name, tensors in lists.items():
        for index, tensor in enumerate(tensors):
            where = f"{name}[{index}]"
            if tensor is None:
                if name not in holes:
                    raise ValueError(f"{where}: got None, want a tensor")
            elif not tensor.dtype.is_floating_point:
                raise ValueError(f"{where}: got dtype {tensor.dtype}, want a floating-point dtype")
            elif tensor.device != device:
                raise ValueError(f"{where}: is on {tensor.device}, want {device} like the first")
            elif not tensor.is_contiguous():
                raise ValueError(
                    f"{where}: got strides {tensor.stride()} for shape {tuple(tensor.shape)}, "
                    "want a contiguous tensor; pass .contiguous() storage"
                )
    raise AssertionError("a fault was seen and not found")


def _devices_and_dtypes(tensors: list[Tensor]) -> Iterable[tuple[torch.device, torch.dtype]]:
    lists: list[list[Tensor | None]] = [[*tensors]]
    return torch._C._group_tensors_by_device_and_dtype(lists, False) if tensors else ()


def check_distinct(name: str, tensors: Sequence[Tensor] | None) -> None:
    """Raise ValueError if two of the tensors start at one address: writes to both would race."""
    first_at: dict[int, int] = {}
    if tensors is None or len(set(map(Tensor.data_ptr, tensors))) == len(tensors):
        return
    for index, tensor in enumerate(tensors):
        if tensor.numel() and first_at.setdefault(tensor.data_ptr(), index) != index:
            raise ValueError(
                f"{name}[{index}]: is the memory of {name}[{first_at[tensor.data_ptr()]}]; "
                "give each tensor once"
            )


def refuse_second_derivative(ops: str) -> Callable[..., NoReturn]:
    """Return what torch.library calls for the gradient of the gradient of ``ops``."""

    def refuse(ctx: object, *grads: object) -> NoReturn:
        raise NotImplementedError(
            f"{ops}: the gradient cannot be differentiated again; call backward without "
            "create_graph=True, or detach the gradient"
        )

    return refuse


def check_weight(weight: float | Tensor, tensors: Sequence[Tensor]) -> None:
    """Raise ValueError unless a tensor weight is 0-dim, floating-point and beside ``tensors``."""
    if not isinstance(weight, Tensor):
        return
    if weight.dim() != 0 or not weight.dtype.is_floating_point:
        raise ValueError(
            f"weight: got a tensor of shape {tuple(weight.shape)} and dtype {weight.dtype}, "
            "want a float or a 0-dim floating-point tensor"
        )
    if tensors and weight.device != tensors[0].device:
        raise ValueError(f"weight: is on {weight.device}, want {tensors[0].device} like the params")
