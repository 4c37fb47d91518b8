import re

import pytest
import torch

from bench import ROOT
from bench.kernel_families import (
    ALIGNMENT,
    ATTENTION,
    BETWEEN,
    COPIES,
    FAMILIES,
    OTHER,
    POINTWISE,
    PRODUCTS,
    UPDATE,
    family_of_kernel,
    family_of_operator,
    profile_steps,
)

# As the profiler has shown them on GPUs, cut where they only go on.
KERNELS = {
    "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT": PRODUCTS,
    "sm80_xmma_fprop_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize": PRODUCTS,
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16>": PRODUCTS,
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": PRODUCTS,
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>": ATTENTION,
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel": ATTENTION,
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_31": ATTENTION,
    "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda(at::Tensor": COPIES,
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<2u>>": COPIES,
    "void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, float>": COPIES,
    "Memcpy DtoD (Device -> Device)": COPIES,
    "Memset (Device)": COPIES,
    "void at::native::vectorized_elementwise_kernel<8, at::native::silu_kernel": POINTWISE,
    "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16>": POINTWISE,
    "void at::native::reduce_kernel<512, 1, ReduceOp<float, MeanOps<float>>>": POINTWISE,
    "void at::native::(anonymous namespace)::ComputeFusedParamsCUDAKernel<float, float>": POINTWISE,
    "void at::native::(anonymous namespace)::ComputeInternalGradientsCUDAKernel<float>": POINTWISE,
    # Inductor names a kernel after everything around it.
    "triton_poi_fused_add_gelu_mul_3": POINTWISE,
    "triton_red_fused__to_copy_native_group_norm_silu_7": POINTWISE,
    "triton_poi_fused_add_convolution_1": POINTWISE,
    "triton_poi_fused__scaled_dot_product_flash_attention_view_2": POINTWISE,
    "triton_poi_fused__to_copy_4": COPIES,
    "triton_poi_fused_cat_12": COPIES,
    "triton_tem_fused_mm_5": PRODUCTS,
    "triton_tem_fused_flex_attention_0": ATTENTION,
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdam>": UPDATE,
    "some_vendor_thing": OTHER,
}
# Which family the kernels of each of our ops are.
OURS = {
    "anchor_penalty": UPDATE,
    "lora_anchor_penalty": UPDATE,
    "anchored_adamw": UPDATE,
    "attention_alignment": ALIGNMENT,
    "feature_alignment": ALIGNMENT,
    "adaptive_denoising": ALIGNMENT,
}


@pytest.mark.parametrize(("name", "family"), KERNELS.items())
def test_kernels_of_a_gpu_are_of_the_family_that_their_names_say(name, family):
    assert family_of_kernel(name) == family


def test_every_kernel_of_ours_is_of_the_family_of_its_op():
    found = {}
    for path in (ROOT / "kernels" / "fastppt_kernels").rglob("*.py"):
        names = re.findall(r"@triton\.jit.*\ndef (\w+_kernel)\(", path.read_text())
        found |= dict.fromkeys(names, path.parent.name)
    assert len(found) > 10
    assert {name: family_of_kernel(name) for name in found} == {
        name: OURS[op] for name, op in found.items()
    }


@pytest.mark.parametrize(
    ("name", "scopes", "family"),
    [
        ("aten::addmm", ["aten::linear"], PRODUCTS),
        ("aten::mkldnn_convolution", [], PRODUCTS),
        ("aten::_slow_conv2d_backward", [], PRODUCTS),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [], ATTENTION),
        ("aten::native_group_norm", [], POINTWISE),
        ("aten::upsample_bilinear2d", [], POINTWISE),
        ("aten::mul", ["MulBackward0"], POINTWISE),
        ("aten::copy_", ["aten::_to_copy"], COPIES),
        ("aten::addmm", ["aten::linear", "Optimizer.step#AnchoredAdamW.step"], UPDATE),
        ("Optimizer.step#AnchoredAdamW.step", [], UPDATE),
        ("aten::bmm", ["Direct__alignment_op"], ALIGNMENT),
        ("aten::var", ["_AlignFeaturesBackward", "autograd::engine::evaluate_function"], ALIGNMENT),
        ("aten::bmm", ["Direct__attention_op"], ATTENTION),
        ("fastppt_kernels::attention_alignment", [], ALIGNMENT),
        ("fastppt_kernels::attention", [], ATTENTION),
        ("autograd::engine::evaluate_function: AddmmBackward0", [], OTHER),
    ],
)
def test_operators_are_of_their_own_family_or_of_what_they_run_in(name, scopes, family):
    assert family_of_operator(name, scopes) == family


def test_a_profile_adds_up_to_the_step_and_names_the_largest():
    matrix = torch.randn(256, 256)

    def step():
        for _ in range(4):
            matrix @ matrix
        matrix.exp()

    profile = profile_steps(step, "cpu", 3)
    rows = {row["family"]: row for row in profile["families"]}
    assert tuple(rows) == FAMILIES
    assert rows[PRODUCTS]["calls"] == 8 and rows[POINTWISE]["calls"] == 1
    assert rows[UPDATE]["s"] == 0 and rows[BETWEEN]["s"] >= 0
    assert rows[PRODUCTS]["s"] > rows[POINTWISE]["s"] > 0
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1, abs=0.2)
    largest = profile["top"][0]
    assert (largest["name"], largest["family"], largest["calls"]) == ("aten::mm", PRODUCTS, 4)
    assert largest["share"] == pytest.approx(largest["s"] / profile["profiled step s"])


@pytest.mark.gpu
def test_kernels_of_a_replayed_graph_are_seen_with_their_time():
    matrix = torch.randn(2048, 2048, device="cuda")
    result = torch.empty_like(matrix)

    def call():
        torch.mm(matrix, matrix, out=result)
        result.exp_()

    call()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    profile = profile_steps(graph.replay, "cuda", 2)
    rows = {row["family"]: row for row in profile["families"]}
    assert rows[PRODUCTS]["calls"] >= 1 and rows[POINTWISE]["calls"] == 1
    assert rows[PRODUCTS]["s"] > rows[POINTWISE]["s"] > 0
    assert 0 <= rows[BETWEEN]["share"] < 0.9
