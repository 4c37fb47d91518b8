"""What ``fastppt_kernels.aot`` compiles of the step."""

from itertools import product
from typing import Any

from fastppt_kernels.anchored_adamw.op import CHUNK_SIZE, NUM_WARPS, PULLS, REDUCE_SIZE
from fastppt_kernels.launch import KernelConfiguration

# Working copies, rounding at random: a parameter has one of them at most.
STORES = ((False, False), (True, False), (False, True))


def kernel_configurations() -> list[KernelConfiguration]:
    """Return every way in which the launches compile."""
    flags = (False, True)
    return [
        *(_square_configuration(pull) for pull in PULLS.values()),
        *(_reduce_configuration(*given) for given in product(flags, repeat=4)),
        *(
            _update_configuration(eight_bit, pull, may_skip, *stores)
            for eight_bit, pull, may_skip, stores in product(flags, PULLS.values(), flags, STORES)
        ),
    ]


def _square_configuration(pull: int) -> KernelConfiguration:
    from fastppt_kernels.anchored_adamw.triton_kernel import anchored_adamw_square_kernel

    return KernelConfiguration(
        name="anchored_adamw_square",
        kernel=anchored_adamw_square_kernel,
        signature={
            "table_ptr": "*i64",
            "weight_ptr": "*fp32",
            "partial_ptr": "*fp32",
            "first_row": "i32",
            "row_size": "i32",
            "first_chunk": "i32",
            "num_chunks": "i32",
            "PULL": "constexpr",
            "BLOCK_SIZE": "constexpr",
        },
        constexprs={"PULL": pull, "BLOCK_SIZE": CHUNK_SIZE},
        num_warps=NUM_WARPS,
    )


def _reduce_configuration(
    has_extra: bool, has_skip: bool, has_clip: bool, skip_non_finite: bool
) -> KernelConfiguration:
    from fastppt_kernels.anchored_adamw.triton_kernel import anchored_adamw_reduce_kernel

    pointers: dict[str, Any] = {} if has_extra else {"extra_penalty_ptr": None}
    pointers |= {} if has_skip else {"skip_ptr": None}
    flags = {"HAS_CLIP": has_clip, "SKIP_NON_FINITE": skip_non_finite}
    return KernelConfiguration(
        name="anchored_adamw_reduce",
        kernel=anchored_adamw_reduce_kernel,
        signature={
            "partial_ptr": "*fp32",
            "extra_penalty_ptr": "*fp32" if has_extra else "constexpr",
            "skip_ptr": "*u8" if has_skip else "constexpr",
            "step_table_ptr": "*i64",
            "correction_ptr": "*fp32",
            "result_ptr": "*fp32",
            "skipped_ptr": "*u8",
            "max_grad_norm": "fp32",
            "num_chunks": "i32",
            "num_params": "i32",
            "HAS_CLIP": "constexpr",
            "SKIP_NON_FINITE": "constexpr",
            "BLOCK_SIZE": "constexpr",
        },
        constexprs=pointers | flags | {"BLOCK_SIZE": REDUCE_SIZE},
        num_warps=NUM_WARPS,
    )


def _update_configuration(
    eight_bit: bool, pull: int, may_skip: bool, has_copies: bool, rounds: bool
) -> KernelConfiguration:
    from fastppt_kernels.anchored_adamw.triton_eight_bit_kernel import (
        anchored_adamw_eight_bit_kernel,
    )
    from fastppt_kernels.anchored_adamw.triton_update_kernel import anchored_adamw_update_kernel

    pointers: dict[str, Any] = {} if may_skip else {"skipped_ptr": None}
    maps = {"map_ptr": "*fp32"} if eight_bit else {}
    flags = {"PULL": pull, "HAS_COPIES": has_copies, "ROUND_AT_RANDOM": rounds}
    return KernelConfiguration(
        name="anchored_adamw_eight_bit" if eight_bit else "anchored_adamw_update",
        kernel=anchored_adamw_eight_bit_kernel if eight_bit else anchored_adamw_update_kernel,
        signature={
            "table_ptr": "*i64",
            "lr_ptr": "*fp32",
            "weight_ptr": "*fp32",
            "correction_ptr": "*fp32",
            "result_ptr": "*fp32",
            "skipped_ptr": "*u8" if may_skip else "constexpr",
            "step_table_ptr": "*i64",
            "first_row": "i32",
            "first_param": "i32",
            "seed": "i32",
            "beta2": "fp32",
            "one_minus_beta1": "fp32",
            "one_minus_beta2": "fp32",
            "eps": "fp32",
            "weight_decay": "fp32",
            **maps,
            "PULL": "constexpr",
            "HAS_COPIES": "constexpr",
            "ROUND_AT_RANDOM": "constexpr",
            "BLOCK_SIZE": "constexpr",
        },
        constexprs=pointers | flags | {"BLOCK_SIZE": CHUNK_SIZE},
        num_warps=NUM_WARPS,
    )
