"""Moments in 8 bits beside torchao's, where that is installed: ``pip install torchao``.

Two things differ, and are our choice: the smallest scale, and that no second moment is stored as
zero that is not. A value on a bound of the map to its last digit may fall on either side.
"""

import pytest
import torch

from fastppt_kernels import AnchoredAdamW
from fastppt_kernels.anchored_adamw import eight_bit
from fastppt_kernels.testing import draw_tensors
from tests.kernels.small_optimizers import F32, LR

pytestmark = pytest.mark.slow

# Whole blocks: torchao keeps moments of other sizes, and of less than 4096 elements, in float32.
SHAPE = (32, 256)


@pytest.fixture(scope="module")
def torchao_optim():
    # Also skips where it is installed and does not fit the torch that is here.
    return pytest.importorskip("torchao.optim", reason="needs torchao", exc_type=ImportError)


@pytest.fixture
def make_state(torchao_optim):
    """Return a maker of torchao's moment of zeros."""
    subclass = pytest.importorskip("torchao.optim.subclass_8bit").OptimState8bit

    def make(signed):
        return subclass.zeros(SHAPE, signed, eight_bit.BLOCK_SIZE)

    return make


def draw_values(signed):
    """Values over ten decades, whose blocks have others for their largest."""
    values, exponents = draw_tensors([SHAPE, SHAPE], dtype=F32)
    sizes = torch.linspace(1, 1e-4, SHAPE[0])[:, None]
    values = sizes * values * 10 ** (4 * exponents.tanh() - 5)
    return values if signed else values.abs()


@pytest.mark.parametrize("signed", [True, False])
def test_map_codes_and_scales_are_torchaos_bit_for_bit(make_state, signed):
    maps, theirs = eight_bit.make_maps(torch.device("cpu"))[0 if signed else 1], make_state(signed)
    assert torch.equal(maps.values, theirs.qmap)
    values = draw_values(signed)
    theirs.copy_(values)
    codes, scales = eight_bit.quantize(values.flatten(), maps.bounds)
    if not signed:
        # What they would store as zero has the smallest value of the map here.
        lost = (theirs.codes == 0) & (values > 0)
        assert 0 < lost.sum() < 0.5 * lost.numel()
        assert (codes.view(SHAPE)[lost] == 1).all()
        codes = torch.where(lost.flatten(), 0, codes)
    assert torch.equal(scales, theirs.scale)
    assert torch.equal(codes.view(SHAPE), theirs.codes)
    decoded = eight_bit.dequantize(codes, scales, maps.values)
    assert torch.equal(decoded.view(SHAPE), theirs.dequantize())


def test_scales_of_small_moments_are_not_held_at_torchaos_floor(make_state):
    maps, theirs = eight_bit.make_maps(torch.device("cpu"))[1], make_state(False)
    values = torch.full(SHAPE, 1e-16)
    theirs.copy_(values)
    assert (theirs.scale == 1e-12).all()
    codes, scales = eight_bit.quantize(values.flatten(), maps.bounds)
    assert (scales == 1e-16).all()
    assert torch.equal(eight_bit.dequantize(codes, scales, maps.values), values.flatten())


def draw_noise(step):
    """Nowhere near zero, where a second moment would be stored as another value than theirs."""
    (noise,) = draw_tensors([SHAPE], seed=10 + step, dtype=F32)
    return noise.sign() * (0.1 + noise.abs())


def train(make_optimizer, num_steps, pull):
    """Return how far a parameter moves, and the state of its optimizer.

    Args:
        pull: What the parameter adds to the gradients; 0: they are the same, wherever it is.
    """
    param = torch.nn.Parameter(draw_tensors([SHAPE], dtype=F32)[0])
    start = param.detach().double()
    optimizer = make_optimizer([param], lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    # torchao compiles its step; op by op it is the same.
    with torch.compiler.set_stance("force_eager"):
        for step in range(num_steps):
            param.grad = draw_noise(step) + pull * torch.sin(param.detach())
            optimizer.step()
    return param.detach().double() - start, optimizer.state[param]


def ours(params, **options):
    return AnchoredAdamW(params, moments="8bit", **options)


@pytest.mark.parametrize("num_steps", [1, 50])
def test_the_same_gradients_leave_torchaos_codes_and_scales(torchao_optim, num_steps):
    (_, state), (_, theirs) = (train(o, num_steps, 0) for o in (ours, torchao_optim.AdamW8bit))
    assert torch.equal(state["exp_avg"], theirs["exp_avg"].codes)
    assert torch.equal(state["exp_avg_scale"], theirs["exp_avg"].scale)
    # Its sum is rounded in another order: the last digit, and at times the far side of a bound.
    wanted = theirs["exp_avg_sq"]
    torch.testing.assert_close(state["exp_avg_sq_scale"], wanted.scale, rtol=2e-6, atol=0)
    apart = (state["exp_avg_sq"].int() - wanted.codes.int()).abs()
    assert apart.max() <= 1 and (apart > 0).sum() <= 0.001 * apart.numel()


@pytest.mark.parametrize("num_steps", [1, 20, 50])
def test_a_run_is_that_of_torchaos_adamw(torchao_optim, num_steps):
    kinds = (ours, torchao_optim.AdamW8bit, torch.optim.AdamW)
    moved, wanted, exact = (train(kind, num_steps, 3.0)[0] for kind in kinds)
    apart = (moved - wanted).norm() / wanted.norm()
    # A code on the far side of a bound now and then; float32 moments end far from both.
    assert apart <= 5e-4
    assert num_steps == 1 or 10 * apart < (moved - exact).norm() / wanted.norm()
