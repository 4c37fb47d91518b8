"""How the attention maps' work is cut into programs."""

import pytest
import torch

from fastppt_kernels.attention_alignment import plan
from fastppt_kernels.attention_alignment.configurations import kernel_configurations
from fastppt_kernels.testing import INTERPRETED


@pytest.mark.parametrize(
    ("head_dim", "pieces"),
    {
        1: (16, 0),
        16: (16, 0),
        24: (32, 0),
        40: (64, 0),
        56: (64, 0),
        64: (64, 0),
        80: (64, 16),
        128: (128, 0),
        160: (128, 32),
        256: (256, 0),
    }.items(),
)
def test_a_head_dim_is_two_powers_of_two(head_dim, pieces):
    assert plan.split_head_dim(head_dim) == pieces


@pytest.mark.parametrize("given", [False, True])
def test_77_text_tokens_take_80_columns_and_154_take_160(given):
    taken = {n: plan.choose_keys(torch.bfloat16, 64, n, given) for n in (64, 77, 154, 256, 333)}
    assert taken == {64: (64, 0), 77: (64, 16), 154: (64, 16), 256: (64, 0), 333: (64, 0)}


def test_groups_of_heads_are_equal_where_they_can_be():
    assert [plan.choose_group_heads(n) for n in (1, 5, 6, 8, 10, 20, 24)] == [1, 5, 3, 4, 5, 5, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_partial_gradients_of_a_64x64_layer_are_a_ninth_of_its_maps(dtype):
    block = plan.key_tiling(dtype, 64).block_queries
    pieces = -(-77 // plan.gradient_keys(dtype, 64))
    num_splits = -(-4096 // plan.choose_split_queries(4096, block, 10 * pieces))
    assert num_splits * 64 / 4096 <= 1 / 9


def test_splits_are_of_whole_blocks_and_give_each_unit_a_program():
    assert plan.choose_split_queries(256, 64, 24) == 64
    assert plan.choose_split_queries(1024, 64, 60) == 384
    assert plan.choose_split_queries(1024, 64, 200) == 512
    assert plan.choose_split_queries(1, 64, 1) == 64


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no parameters of kernels")
def test_no_integer_argument_makes_another_compilation():
    for given in kernel_configurations():
        integers = {name for name, kind in given.signature.items() if kind == "i32"}
        free = {p.name for p in given.kernel.params if p.do_not_specialize}
        assert integers <= free, given.name


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", plan.HEAD_DIMS)
def test_several_tiles_of_the_gradient_have_one_piece(dtype, head_dim, given):
    for num_keys in range(1, 513):
        main, rest = plan.choose_gradient_keys(dtype, head_dim, num_keys, given)
        assert rest == 0 or (not given and num_keys <= main + rest)
