"""What ``fastppt_kernels.aot`` compiles of the attention maps."""

from typing import Any

import torch

from fastppt_kernels.attention_alignment.plan import (
    ALIGNED_ELEMENTS,
    HEAD_DIMS,
    SUM_SIZE,
    SUM_WARPS,
    Tiling,
    choose_gradient_keys,
    choose_keys,
    forward_tiling,
    gradient_keys,
    key_tiling,
    logsumexp_keys,
    name_dims,
    query_tiling,
)
from fastppt_kernels.launch import KernelConfiguration

# Text tokens of one tile without and with a second piece, and of several with and without.
NUM_KEYS = (16, 77, 154, 256)


def kernel_configurations() -> list[KernelConfiguration]:
    """Return the ways in which the launches compile for the head dims and dtypes of the models.

    Of strides that are multiples of 8 elements, as head dims make them.
    """
    configurations = []
    for dtype, triton_type in (("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "fp16")):
        for head_dim in HEAD_DIMS:
            configurations += _configurations_of(getattr(torch, dtype), triton_type, head_dim)
        configurations.append(_sum_configuration(triton_type))
    return configurations + _difference_configurations()


def _configurations_of(
    dtype: torch.dtype, triton_type: str, head_dim: int
) -> list[KernelConfiguration]:
    from fastppt_kernels.attention_alignment.triton_backward_key_kernel import (
        attention_map_backward_key_kernel,
    )
    from fastppt_kernels.attention_alignment.triton_backward_query_kernel import (
        attention_map_backward_query_kernel,
    )
    from fastppt_kernels.attention_alignment.triton_kernel import (
        attention_logsumexp_kernel,
        attention_map_sum_kernel,
    )

    forward, of_query, of_key = (
        tiling(dtype, head_dim) for tiling in (forward_tiling, query_tiling, key_tiling)
    )
    shared: dict[str, Any] = {"STRIDE_UNIT": ALIGNED_ELEMENTS, "UPCAST": False}
    shared |= name_dims(dtype, head_dim)
    # What the launches choose for these numbers of text tokens, and so for all.
    map_sums, of_queries = set(), set()
    for given in (False, True):
        for num_keys in NUM_KEYS:
            main, rest = choose_keys(dtype, head_dim, num_keys, given)
            map_sums.add((given or num_keys > main + rest, main, rest))
            main, rest = choose_gradient_keys(dtype, head_dim, num_keys, given)
            one_tile = not given and num_keys <= main + rest
            of_queries.add((given, main, rest, one_tile))
    constexprs = shared | {"KEYS": logsumexp_keys(dtype, head_dim)}
    found = [_configuration(attention_logsumexp_kernel, triton_type, forward, constexprs)]
    for given, main, rest in sorted(map_sums):
        constexprs = shared | {"KEYS_MAIN": main, "KEYS_REST": rest}
        constexprs |= {} if given else {"logsumexp_ptr": None}
        found.append(_configuration(attention_map_sum_kernel, triton_type, forward, constexprs))
    for given, main, rest, one_tile in sorted(of_queries):
        constexprs = shared | {"GIVEN_LOGSUMEXP": given, "KEYS_MAIN": main, "KEYS_REST": rest}
        constexprs["ONE_TILE"] = one_tile
        found.append(
            _configuration(attention_map_backward_query_kernel, triton_type, of_query, constexprs)
        )
    for given in (False, True):
        constexprs = shared | {"KEYS": gradient_keys(dtype, head_dim), "GIVEN_LOGSUMEXP": given}
        found.append(
            _configuration(attention_map_backward_key_kernel, triton_type, of_key, constexprs)
        )
    return found


def _configuration(
    kernel: Any, triton_type: str, tiling: Tiling, constexprs: dict[str, Any]
) -> KernelConfiguration:
    """Return a configuration; arguments are of the type that their names say."""
    inputs = dict.fromkeys(("query_ptr", "key_ptr", "grad_query_ptr"), triton_type)
    constexprs = constexprs | {"BLOCK_QUERIES": tiling.block_queries}
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + inputs.get(name, "fp32")
        else:
            signature[name] = "fp32" if name in ("scale", "factor") else "i32"
    return KernelConfiguration(
        kernel.__name__.removesuffix("_kernel"),
        kernel,
        signature,
        {name: constexprs[name] for name in kernel.arg_names if name in constexprs},
        tiling.num_warps,
        tiling.num_stages,
        has_dot=True,
    )


def _sum_configuration(triton_type: str) -> KernelConfiguration:
    from fastppt_kernels.attention_alignment.triton_backward_key_kernel import (
        attention_sum_splits_kernel,
    )

    names = attention_sum_splits_kernel.arg_names
    pointers = {"partial_ptr": "*fp32", "grad_key_ptr": "*" + triton_type}
    constexprs = {"HEAD_DIM": 64, "BLOCK_SIZE": SUM_SIZE}
    others = dict.fromkeys(names, "i32") | dict.fromkeys(constexprs, "constexpr") | pointers
    return KernelConfiguration(
        "attention_sum_splits",
        attention_sum_splits_kernel,
        {name: others[name] for name in names},
        constexprs,
        SUM_WARPS,
    )


def _difference_configurations() -> list[KernelConfiguration]:
    """Return those of sums alone, with a base, and with columns."""
    from fastppt_kernels.attention_alignment.triton_kernel import attention_difference_kernel

    found = []
    for absent in (
        ("base_ptr", "columns_ptr", "partial_ptr"),
        ("columns_ptr",),
        (),
    ):
        constexprs: dict[str, Any] = dict.fromkeys(absent) | {"BLOCK_SIZE": SUM_SIZE}
        signature = {}
        for name in attention_difference_kernel.arg_names:
            if name in constexprs:
                signature[name] = "constexpr"
            elif name.endswith("_ptr"):
                signature[name] = "*i64" if name == "columns_ptr" else "*fp32"
            else:
                signature[name] = "i32"
        found.append(
            KernelConfiguration(
                "attention_difference",
                attention_difference_kernel,
                signature,
                constexprs,
                SUM_WARPS,
            )
        )
    return found
