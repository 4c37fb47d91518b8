"""The launches of the adaptive denoising loss: memory layouts, how work is cut, configurations."""

import math

import torch
from torch import Tensor

from fastppt_kernels.launch import (
    ALIGNED_ELEMENTS,
    POINTER_TYPES,
    KernelConfiguration,
    device_of,
)

# Elements a program of what goes over the samples.
BLOCK_SIZE = 4096
NUM_WARPS = 8
# What the one program of the indicator reads at a time: samples, bins, blocks of a sample.
INDICATOR_TILE = {"BLOCK_SAMPLES": 16, "BLOCK_BINS": 16, "BLOCK_BLOCKS": 32}
INDICATOR_WARPS = 4


def lay_alike(*tensors: Tensor) -> list[Tensor]:
    """Return [B, ...] tensors with each sample's elements side by side, in the order of the first.

    A tensor that is so already, as those of a training are, is returned itself.
    """
    # Dense, whatever the first tensor is: a sample of a dense batch need not be.
    sample = torch.empty_like(tensors[0][0], device="meta")
    return [
        t
        if _strides(t[0]) == _strides(sample)
        else torch.empty_strided(
            t.shape, (sample.numel(), *sample.stride()), dtype=t.dtype, device=t.device
        ).copy_(t)
        for t in tensors
    ]


def _strides(tensor: Tensor) -> list[int]:
    sizes_and_strides = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for size, stride in sizes_and_strides if size > 1]


def _read_steps(*tensors: Tensor) -> tuple[list[int], bool]:
    """Return the strides of the samples, and ALIGNED of a launch on these tensors."""
    steps = [t.stride(0) if len(t) > 1 else 0 for t in tensors]
    sizes = [*steps, tensors[0][0].numel()]
    return steps, all(size % ALIGNED_ELEMENTS == 0 for size in sizes)


def launch_forward(
    prediction: Tensor,
    base_prediction: Tensor,
    target: Tensor,
    bins: Tensor,
    base_ema: Tensor,
    tuned_ema: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, gamma, new_base_ema, new_tuned_ema and coefficients, in two launches."""
    from fastppt_kernels.adaptive_denoising.triton_kernel import (
        denoising_indicator_kernel,
        denoising_partials_kernel,
    )

    tensors = lay_alike(prediction, base_prediction, target)
    steps, aligned = _read_steps(*tensors)
    num_samples, num_elements = len(prediction), prediction[0].numel()
    num_blocks = math.ceil(num_elements / BLOCK_SIZE)
    shape = (num_samples, num_blocks, 2)
    partials = torch.empty(shape, dtype=torch.float64, device=prediction.device)
    loss = torch.empty((), dtype=torch.float32, device=prediction.device)
    gamma, coefficients = (loss.new_empty(num_samples) for _ in range(2))
    new_base_ema, new_tuned_ema = (loss.new_empty(len(base_ema)) for _ in range(2))
    with device_of(prediction):
        denoising_partials_kernel[(num_blocks, num_samples)](
            *tensors,
            partials,
            num_elements,
            *steps,
            ALIGNED=aligned,
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=NUM_WARPS,
        )
        denoising_indicator_kernel[(1,)](
            partials,
            bins.contiguous(),
            tuned_ema.contiguous(),
            base_ema.contiguous(),
            None if sample_weight is None else sample_weight.to(torch.float32).contiguous(),
            loss,
            gamma,
            coefficients,
            new_tuned_ema,
            new_base_ema,
            num_samples,
            len(base_ema),
            num_blocks,
            num_elements,
            temperature,
            smoothing,
            **INDICATOR_TILE,
            num_warps=INDICATOR_WARPS,
        )
    return loss, gamma, new_base_ema, new_tuned_ema, coefficients


def launch_backward(
    prediction: Tensor, target: Tensor, coefficients: Tensor, loss_grad: Tensor
) -> Tensor:
    """Return the gradient of the prediction, of its strides, in one launch."""
    from fastppt_kernels.adaptive_denoising.triton_kernel import denoising_backward_kernel

    grad = torch.empty_like(prediction)
    prediction, target, written = lay_alike(prediction, target, grad)
    steps, aligned = _read_steps(prediction, target, written)
    num_samples, num_elements = len(prediction), prediction[0].numel()
    with device_of(prediction):
        denoising_backward_kernel[(math.ceil(num_elements / BLOCK_SIZE), num_samples)](
            prediction,
            target,
            coefficients,
            loss_grad,
            written,
            num_elements,
            *steps,
            ALIGNED=aligned,
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=NUM_WARPS,
        )
    return grad if written is grad else grad.copy_(written)


def kernel_configurations() -> list[KernelConfiguration]:
    """Return the ways in which the three launches compile.

    Of the mixtures of dtypes those that trainings have: both predictions of one, the target of
    the same or float32. Others differ in the width of a load.
    """
    from fastppt_kernels.adaptive_denoising.triton_kernel import (
        denoising_backward_kernel,
        denoising_partials_kernel,
    )

    configurations = []
    mixtures = [(dtype, dtype) for dtype in POINTER_TYPES]
    mixtures += [(dtype, torch.float32) for dtype in (torch.bfloat16, torch.float16)]
    for dtype, target_dtype in mixtures:
        prediction, target = POINTER_TYPES[dtype], POINTER_TYPES[target_dtype]
        for aligned in (True, False):
            constexprs = {"ALIGNED": aligned, "BLOCK_SIZE": BLOCK_SIZE}
            compiled = dict.fromkeys(constexprs, "constexpr")
            forward = {"prediction_ptr": prediction, "base_prediction_ptr": prediction}
            forward |= {"target_ptr": target, "partial_ptr": "*fp64"}
            integers = ("num_elements", "stride_p", "stride_b", "stride_t")
            backward = {"prediction_ptr": prediction, "target_ptr": target}
            backward |= {"coefficient_ptr": "*fp32", "loss_grad_ptr": "*fp32"}
            backward |= {"grad_ptr": prediction}
            grad_integers = ("num_elements", "stride_p", "stride_t", "stride_g")
            for name, kernel, signature in (
                (
                    "denoising_partials",
                    denoising_partials_kernel,
                    forward | dict.fromkeys(integers, "i32"),
                ),
                (
                    "denoising_backward",
                    denoising_backward_kernel,
                    backward | dict.fromkeys(grad_integers, "i32"),
                ),
            ):
                label = f"{name}, {dtype}, target {target_dtype}"
                configurations.append(
                    KernelConfiguration(label, kernel, signature | compiled, constexprs, NUM_WARPS)
                )
    return configurations + [_indicator_configuration(kind) for kind in ("*fp32", "constexpr")]


def _indicator_configuration(sample_weight: str) -> KernelConfiguration:
    from fastppt_kernels.adaptive_denoising.triton_kernel import denoising_indicator_kernel

    signature = {"partial_ptr": "*fp64", "bin_ptr": "*i64"}
    signature |= dict.fromkeys(("ema_ptr", "base_ema_ptr"), "*fp32")
    signature |= {"sample_weight_ptr": sample_weight}
    written = ("loss_ptr", "gamma_ptr", "coefficient_ptr", "new_ema_ptr", "new_base_ema_ptr")
    signature |= dict.fromkeys(written, "*fp32")
    integers = ("num_samples", "num_bins", "num_blocks", "num_elements")
    signature |= dict.fromkeys(integers, "i32")
    signature |= dict.fromkeys(("temperature", "smoothing"), "fp32")
    pointers = {"sample_weight_ptr": None} if sample_weight == "constexpr" else {}
    return KernelConfiguration(
        "denoising_indicator",
        denoising_indicator_kernel,
        signature | dict.fromkeys(INDICATOR_TILE, "constexpr"),
        pointers | INDICATOR_TILE,
        INDICATOR_WARPS,
    )
