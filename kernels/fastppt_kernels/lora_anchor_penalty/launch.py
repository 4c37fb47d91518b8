"""The launches of the LoRA anchor penalty: four for each variant of rank and anchor that occurs."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fastppt_kernels.anchor_penalty.op import launch_weighted_sum
from fastppt_kernels.launch import (
    KernelConfiguration,
    addresses_of,
    cached_table,
    codes_of,
    device_of,
    split_weight,
    weight_arguments,
)
from fastppt_kernels.lora_anchor_penalty.plan import (
    APPLY_COLUMNS,
    APPLY_RANKS,
    GRAM_BLOCK,
    GRAM_COLUMNS,
    REDUCE_SIZE,
    VARIANTS,
    PairKey,
    Variant,
    make_plan,
)

APPLY_WARPS = 8
REDUCE_WARPS = 4
_cached_plan = lru_cache(maxsize=16)(make_plan)


def launch_lora_anchor_(
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    down_grads: Sequence[Tensor] | None,
    up_grads: Sequence[Tensor] | None,
    weight: float | Tensor,
    anchor_downs: Sequence[Tensor | None],
    anchor_ups: Sequence[Tensor | None],
) -> Tensor:
    """Do the work of :func:`lora_anchor_penalty_`; the launches do not grow with the pairs.

    Gram partials, their reduction, the products added to the gradients: three launches for each
    variant that occurs (pairs of rank up to 16, up to 32 and beyond, with and without an anchor),
    and one that sums the penalty. Most lists have one variant.

    Memory: one rank x rank float32 matrix for each chunk of a Gram, that is for each 512 columns
    of a factor; with an anchor a factor has three Grams.
    """
    from fastppt_kernels.lora_anchor_penalty.triton_kernel import (
        lora_apply_kernel,
        lora_gram_kernel,
        lora_reduce_kernel,
    )

    device = downs[0].device
    pairs = _keys(downs, ups, scales, down_grads, up_grads, anchor_downs, anchor_ups)
    if not pairs:
        return torch.zeros((), device=device)
    plan = _cached_plan(pairs)
    table = cached_table(("lora", pairs), lambda: plan.rows, device)
    scratch = torch.empty(plan.num_floats, dtype=torch.float32, device=device)
    parts = torch.empty(plan.num_parts, dtype=torch.float32, device=device)
    weight_tensor, weight_value = split_weight(weight)
    with device_of(downs[0]):
        for work in plan.works:
            variant = work.variant
            lora_gram_kernel[(len(work.gram),)](
                table[work.gram.start :],
                scratch,
                **_gram_constexprs(variant),
                num_warps=variant.gram_warps,
            )
            lora_reduce_kernel[(len(work.reduce),)](
                table[work.reduce.start :],
                scratch,
                parts,
                weight_tensor,
                weight_value,
                ANCHORED=variant.anchored,
                BLOCK_SIZE=REDUCE_SIZE,
                num_warps=REDUCE_WARPS,
            )
            if down_grads is not None:
                lora_apply_kernel[(len(work.apply),)](
                    table[work.apply.start :],
                    scratch,
                    **_apply_constexprs(variant),
                    num_warps=APPLY_WARPS,
                )
    return launch_weighted_sum(parts, weight)


def _keys(
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    down_grads: Sequence[Tensor] | None,
    up_grads: Sequence[Tensor] | None,
    anchor_downs: Sequence[Tensor | None],
    anchor_ups: Sequence[Tensor | None],
) -> tuple[PairKey, ...]:
    """Return what the work depends on, without the pairs whose dW is zero for it is empty."""
    holes: list[None] = [None] * len(downs)
    sides = []
    for lists in (
        (downs, anchor_downs, holes if down_grads is None else down_grads),
        (ups, anchor_ups, holes if up_grads is None else up_grads),
    ):
        value_codes, anchor_codes, grad_codes = map(codes_of, lists)
        codes = [
            v | a << 2 | g << 4
            for v, a, g in zip(value_codes, anchor_codes, grad_codes, strict=True)
        ]
        sides.append((*map(addresses_of, lists), codes))
    values, anchors, grads, both_codes = (
        zip(*both, strict=True) for both in zip(*sides, strict=True)
    )
    shapes = [(d.shape, u.shape[0]) for d, u in zip(downs, ups, strict=True)]
    return tuple(
        PairKey(rank, (width, out), float(scale), *addresses_and_codes)
        for ((rank, width), out), scale, *addresses_and_codes in zip(
            shapes, scales, values, anchors, grads, both_codes, strict=True
        )
        if rank and width and out
    )


def _gram_constexprs(variant: Variant) -> dict[str, bool | int]:
    return {
        "ANCHORED": variant.anchored,
        "ONE_TILE": variant.tile == variant.other_tile,
        "TILE": variant.tile,
        "OTHER_TILE": variant.other_tile,
        "CHUNK_COLUMNS": GRAM_COLUMNS,
        "BLOCK_COLUMNS": GRAM_BLOCK,
    }


def _apply_constexprs(variant: Variant) -> dict[str, bool | int]:
    return {
        "ANCHORED": variant.anchored,
        "TILE": variant.tile,
        "BLOCK_RANKS": APPLY_RANKS,
        "BLOCK_COLUMNS": APPLY_COLUMNS,
    }


def kernel_configurations() -> list[KernelConfiguration]:
    """Return every way in which the launches compile, but for the sum of ``anchor_penalty``."""
    from fastppt_kernels.lora_anchor_penalty.triton_kernel import (
        lora_apply_kernel,
        lora_gram_kernel,
        lora_reduce_kernel,
    )

    pointers = {"table_ptr": "*i64", "scratch_ptr": "*fp32"}
    configurations = []
    for variant in VARIANTS:
        constexprs = _gram_constexprs(variant)
        configurations.append(
            KernelConfiguration(
                "lora_gram",
                lora_gram_kernel,
                pointers | dict.fromkeys(constexprs, "constexpr"),
                constexprs,
                variant.gram_warps,
                has_dot=True,
            )
        )
    # Whether the rank fits in one tile makes no difference here.
    for variant in VARIANTS:
        if variant.tile == variant.other_tile:
            constexprs = _apply_constexprs(variant)
            configurations.append(
                KernelConfiguration(
                    "lora_apply",
                    lora_apply_kernel,
                    pointers | dict.fromkeys(constexprs, "constexpr"),
                    constexprs,
                    APPLY_WARPS,
                    has_dot=True,
                )
            )
    for anchored in (False, True):
        for weight_type in ("fp32", "*fp32"):
            no_pointer, arguments = weight_arguments(weight_type)
            configurations.append(
                KernelConfiguration(
                    "lora_reduce",
                    lora_reduce_kernel,
                    pointers
                    | {"penalty_ptr": "*fp32"}
                    | arguments
                    | {"ANCHORED": "constexpr", "BLOCK_SIZE": "constexpr"},
                    no_pointer | {"ANCHORED": anchored, "BLOCK_SIZE": REDUCE_SIZE},
                    REDUCE_WARPS,
                )
            )
    return configurations
