import pytest
import torch
from torch import nn

from bench.networks import FAMILY_OF, build_network, build_pipeline
from bench.step_costs import MemoryWatch, count_flops, count_launches, product_speed
from fastppt.config import ModelConfig
from fastppt.families.base import PromptEmbeddings
from fastppt.families.loading import make_family

# Of each model's step at its own size: latent channels and side, text tokens and widths.
INPUTS = {
    "sd15": (4, 64, 77, 768, None),
    "sdxl": (4, 128, 77, 2048, 1280),
    "sd3-medium": (16, 128, 154, 4096, 2048),
}


def attend(batch_size, num_heads, num_tokens, head_dim, **options):
    shape = (batch_size, num_heads, num_tokens, head_dim)
    return [torch.randn(shape, requires_grad=True, **options) for _ in range(3)]


def test_products_and_convolutions_are_counted_forward_and_backward():
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(2), nn.Linear(8 * 6, 7))
    images = torch.randn(2, 3, 8, 6, requires_grad=True)
    convolution, linear = 2 * 2 * 8 * 6 * 5 * 3 * 9, 2 * 2 * 5 * (8 * 6) * 7
    assert count_flops(lambda: network(images)) == convolution + linear
    # The gradients of inputs and of weights: each as much as the forward pass.
    assert count_flops(lambda: network(images).sum().backward()) == 3 * (convolution + linear)


def test_products_in_place_are_counted():
    total, left, right = torch.zeros(4, 3, 7), torch.randn(4, 3, 5), torch.randn(4, 5, 7)
    assert count_flops(lambda: total.baddbmm_(left, right)) == 2 * 4 * 3 * 5 * 7
    assert count_flops(lambda: total[0].addmm_(left[0], right[0])) == 2 * 3 * 5 * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_attention_is_counted_with_the_scores_that_its_backward_makes_again(dtype):
    inputs = attend(2, 3, 40, 16, dtype=dtype)
    product = 2 * (2 * 3) * 40 * 40 * 16

    def forward():
        return nn.functional.scaled_dot_product_attention(*inputs)

    assert count_flops(forward) == 2 * product
    assert count_flops(lambda: forward().sum().backward()) == (2 + 5) * product


@pytest.mark.parametrize(
    ("model", "parameters", "forward_tflop"),
    [
        ("sd15", 859_520_964, 0.803),
        ("sdxl", 2_567_463_684, 6.761),
        ("sd3-medium", 2_028_328_000, 8.437),
    ],
)
def test_full_size_networks_have_the_published_sizes(model, parameters, forward_tflop):
    network = build_network(model, "meta")
    assert sum(p.numel() for p in network.parameters()) == parameters
    pipeline = build_pipeline(model, "meta", torch.bfloat16)
    device = torch.device("meta")
    config = ModelConfig(path=model)
    family = make_family(FAMILY_OF[model], pipeline, config, device, torch.bfloat16)
    channels, side, num_tokens, width, pooled_width = INPUTS[model]
    with device:
        prompts = PromptEmbeddings(
            torch.empty(1, num_tokens, width, dtype=torch.bfloat16),
            None if pooled_width is None else torch.empty(1, pooled_width, dtype=torch.bfloat16),
        )
        inputs = torch.empty(1, channels, side, side), torch.zeros(1, dtype=torch.int64)
        sizes = torch.empty(1, 6)
    with torch.no_grad():
        flops = count_flops(lambda: family.predict(*inputs, prompts, sizes))
    assert flops / 1e12 == pytest.approx(forward_tflop, abs=1e-3)


def test_operators_are_counted_without_views_and_allocations():
    matrix = torch.randn(3, 4)

    def call():
        torch.empty(3)
        return (matrix.t() @ matrix).view(-1)[1:].exp_()

    launches = count_launches(call, "cpu")
    assert (launches.kernels, launches.host) == (2, None)


def test_operators_of_the_backward_pass_are_counted():
    leaf = torch.randn(3, requires_grad=True)
    forward = count_launches(lambda: leaf.exp().sum(), "cpu").kernels
    both = count_launches(lambda: leaf.exp().sum().backward(), "cpu").kernels
    assert forward == 2
    assert both > forward


def test_on_the_cpu_memory_is_not_watched():
    memory = MemoryWatch("cpu")
    memory.forget_peak()
    assert memory.read() == (None, None)


def test_the_roof_is_a_speed():
    assert 1e-4 < product_speed("cpu", torch.float32) < 1e3


@pytest.mark.gpu
def test_kernels_of_a_replayed_graph_are_counted_and_its_launch_is_one():
    matrix = torch.randn(64, 64, device="cuda")
    result = torch.empty_like(matrix)

    def call():
        torch.mul(matrix, 2.0, out=result)
        result.add_(1.0)
        result.exp_()

    call()
    eager = count_launches(call, "cuda")
    assert (eager.kernels, eager.host) == (3, 3)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replayed = count_launches(graph.replay, "cuda")
    assert (replayed.kernels, replayed.host) == (3, 1)


@pytest.mark.gpu
def test_peak_memory_is_what_was_taken_since():
    before = torch.empty(1 << 20, device="cuda")
    memory = MemoryWatch("cuda")
    kept = torch.empty(1 << 20, device="cuda")
    passing = torch.empty(1 << 22, device="cuda")
    del passing
    peak, reserved = memory.read()
    assert peak == kept.nbytes + (1 << 24)
    assert reserved >= kept.nbytes
    memory.forget_peak()
    assert memory.read()[0] == kept.nbytes
    del before


@pytest.mark.gpu
def test_flops_of_a_gpu_and_of_the_cpu_are_the_same():
    def count(device):
        inputs = attend(1, 4, 128, 64, dtype=torch.bfloat16, device=device)
        attention = nn.functional.scaled_dot_product_attention
        return count_flops(lambda: attention(*inputs).sum().backward())

    assert count("cuda") == count("cpu")
