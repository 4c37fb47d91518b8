"""One flat parameter and its views are the same memory."""

from __future__ import annotations

import torch
from torch import nn

from fastppt.trainables.arena import ALIGNMENT, ParameterArena


def test_tensors_and_gradients_are_views_of_the_flat_ones() -> None:
    arena = ParameterArena([(3, 5), (7,), (64, 2)], torch.device("cpu"), torch.float32)
    loss = sum((tensor * (place + 1)).sum() for place, tensor in enumerate(arena.tensors))
    loss.backward()
    assert arena.grad.sum() == 15 * 1 + 7 * 2 + 128 * 3
    with torch.no_grad():
        arena.flat.fill_(2)
    assert all((tensor == 2).all() for tensor in arena.tensors)


def test_gradients_accumulate_in_place() -> None:
    arena = ParameterArena([(4, 4)], torch.device("cpu"), torch.float32)
    address = arena.grad.data_ptr()
    for _ in range(2):
        arena.tensors[0].sum().backward()
    assert arena.tensors[0].grad.data_ptr() == arena.grad.data_ptr() == address
    assert (arena.grad[:16] == 2).all()


def test_tensors_begin_at_aligned_places_and_padding_is_zero() -> None:
    arena = ParameterArena([(3, 5), (7,), (65,)], torch.device("cpu"), torch.float32)
    starts = [tensor.storage_offset() for tensor in arena.tensors]
    assert starts == [0, ALIGNMENT, 2 * ALIGNMENT]
    assert arena.flat.numel() == 4 * ALIGNMENT
    with torch.no_grad():
        for tensor in arena.tensors:
            tensor.fill_(1)
    assert arena.flat.sum() == 15 + 7 + 65


def test_working_copy_is_the_values_in_another_dtype_and_follows_when_told() -> None:
    arena = ParameterArena([(3, 5), (7,)], torch.device("cpu"), torch.float32, torch.bfloat16)
    with torch.no_grad():
        arena.flat.fill_(1 + 2.0**-12)
    assert not any(tensor.any() for tensor in arena.working)
    arena.refresh()
    for tensor, working in zip(arena.tensors, arena.working, strict=True):
        assert working.shape == tensor.shape and not working.requires_grad
        assert torch.equal(working, tensor.bfloat16())


def test_parameters_that_are_taken_over_are_views_with_their_values() -> None:
    parameters = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((3, 5), (7,))]
    values = [parameter.detach().clone() for parameter in parameters]
    arena = ParameterArena(
        [(3, 5), (7,)],
        torch.device("cpu"),
        torch.float32,
        torch.bfloat16,
        grad_dtype=torch.bfloat16,
    )
    arena.take_over(parameters)
    for parameter, value, tensor in zip(parameters, values, arena.tensors, strict=True):
        assert torch.equal(parameter, value) and torch.equal(tensor.bfloat16(), value)
    assert arena.flat.dtype == torch.float32 and arena.grad.dtype == torch.bfloat16
    arena.working_copy.fill_(3)
    sum((parameter**2).sum() for parameter in parameters).backward()
    assert all((parameter == 3).all() for parameter in parameters)
    assert arena.grad.sum() == 6 * 22
    arena.require_grad(False)
    assert not any(each.requires_grad for each in (*parameters, arena.flat))


def test_values_of_the_working_dtype_have_no_copy() -> None:
    arena = ParameterArena([(3, 5)], torch.device("cpu"), torch.float32, torch.float32)
    assert arena.working_copy is None
    assert arena.working[0].data_ptr() == arena.tensors[0].data_ptr()
