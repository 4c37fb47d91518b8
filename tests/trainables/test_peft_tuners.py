"""The adapters are peft's: its equations in float64, its values."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn

from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.trainables.peft_tuners import make_tuner
from fastppt.trainables.tuners import Lokr
from fastppt.trainables_config import (
    AdapterConfig,
    BoftConfig,
    DoraConfig,
    LohaConfig,
    LokrConfig,
    OftConfig,
)
from fastppt_kernels.testing import ForbidHostReads
from tests.trainables.peft_cases import (
    BUTTERFLY,
    KINDS,
    Small,
    adapters_for,
    draw_inputs,
    prediction_of,
    small_adapters,
    written,
)

every_kind = pytest.mark.parametrize("kind", KINDS)
all_but_oft_slow = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "oft" else pytest.mark.slow) for kind in KINDS]
)


def loss_of(prediction: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return (prediction * torch.randn(prediction.shape, generator=generator)).sum()


@pytest.fixture
def _no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    # It is not there, and peft takes a while to find out.
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


@every_kind
@pytest.mark.usefixtures("_no_extension")
def test_forward_and_gradients_equal_those_of_pefts_layers(kind: str, tmp_path: Path) -> None:
    """And its `PeftModel` reads the files: that is how the values get there."""
    adapters, run = small_adapters(Small(), KINDS[kind])
    folder = written(tmp_path / "out", adapters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftModel.from_pretrained(Small(), str(folder), is_trainable=True)
    ours, expected = run(draw_inputs()), theirs(draw_inputs())
    base = Small()(draw_inputs())
    assert (expected - base).abs().max() > 0.1 * base.abs().max()
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    loss_of(ours).backward()
    loss_of(expected).backward()
    gradients = {
        key.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight"): (
            value.grad
        )
        for key, value in theirs.named_parameters()
        if value.requires_grad
    }
    for name, values in adapters.values.items():
        for part, value in values.items():
            expected_grad = gradients.pop(f"{name}.{part}".removesuffix(".weight"))
            assert value.grad is not None and expected_grad is not None
            scale = expected_grad.abs().max()
            assert scale > 0
            assert (value.grad - expected_grad).abs().max() <= 1e-10 * scale, (name, part)
    assert not gradients


def test_products_of_rotations_are_those_of_pefts_matrices() -> None:
    """Without its extension peft takes one factor; its matrices are multiplied here by hand."""
    tuner = make_tuner(BUTTERFLY)
    linear = nn.Linear(32, 6).double()
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in tuner.shapes(linear).items()
    }
    inputs = torch.randn(5, 32, generator=generator, dtype=torch.float64)
    rotation = torch.eye(32, dtype=torch.float64)
    for index in range(3):
        # peft counts factors without the first one.
        order = BOFTLayer.block_butterfly_perm(BOFTLayer, 32, 8 // 2**index, 2, 2)
        permutation = BOFTLayer.perm2mat(BOFTLayer, order).double()
        blocks = BOFTLayer.cayley_batch(BOFTLayer, values["boft_R"][index])
        rotation = permutation @ torch.block_diag(*blocks) @ permutation.T @ rotation
    assert (rotation @ rotation.T - torch.eye(32)).abs().max() < 1e-12
    expected = (inputs @ rotation @ linear.weight.T) * values["boft_s"].T + linear.bias
    ours = tuner.project(inputs, linear.weight, linear.bias, values)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_equations_of_the_papers() -> None:
    """Each kind's W', written out; where it differs from peft's, the test against peft says so."""
    linear = nn.Linear(12, 8).double()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 5, 12, generator=generator, dtype=torch.float64)
    frozen = linear.weight.detach()

    def dora(v: dict[str, Tensor]) -> Tensor:
        direction = frozen + 2.0 * v["lora_B.weight"] @ v["lora_A.weight"]
        return v["lora_magnitude_vector"][:, None] * direction / direction.norm(dim=1, keepdim=True)

    def loha(v: dict[str, Tensor]) -> Tensor:
        first, second = v["hada_w1_a"] @ v["hada_w1_b"], v["hada_w2_a"] @ v["hada_w2_b"]
        return frozen + 2.0 * first * second

    def lokr(v: dict[str, Tensor]) -> Tensor:
        return frozen + 2.0 * torch.kron(v["lokr_w1"], v["lokr_w2"])

    def oft(v: dict[str, Tensor]) -> Tensor:
        blocks = []
        for triangle in v["oft_R.weight"]:
            skew = torch.zeros(4, 4, dtype=torch.float64)
            skew[tuple(torch.triu_indices(4, 4, 1))] = triangle
            skew = skew - skew.T
            identity = torch.eye(4, dtype=torch.float64)
            blocks.append((identity - skew) @ torch.linalg.inv(identity + skew))
        return frozen @ torch.block_diag(*blocks).T

    cases: list[tuple[AdapterConfig, Callable[[dict[str, Tensor]], Tensor]]] = [
        (DoraConfig(rank=2, alpha=4.0), dora),
        (LohaConfig(rank=2, alpha=4.0), loha),
        (LokrConfig(rank=2, alpha=4.0), lokr),
        (OftConfig(block_size=4), oft),
    ]
    for config, equation in cases:
        tuner = make_tuner(config)
        values = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in tuner.shapes(linear).items()
        }
        expected = inputs @ equation(values).T + linear.bias
        ours = tuner.project(inputs, linear.weight, linear.bias, values)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_sides_of_kronecker_factors_are_pefts() -> None:
    for limit in (None, 1, 2, 3, 4, 5, 8, 16, 50):
        tuner = Lokr(4, 1.0, limit)
        for size in (*range(1, 200), 320, 640, 768, 1280, 1536, 2048, 4096):
            assert tuner.factorize(size) == factorization(size, limit or -1), (size, limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*KINDS, "boft, factors"])
def test_new_adapters_change_nothing(kind: str, dtype: torch.dtype) -> None:
    network = Small().to(dtype)
    inputs = draw_inputs(dtype)
    before = network(inputs)
    _, run = small_adapters(network, KINDS.get(kind, BUTTERFLY), moved=0.0)
    assert torch.equal(run(inputs), before)


@pytest.mark.parametrize("kind", [*KINDS, "boft, factors"])
def test_sixteen_bits_round_as_the_network_does(kind: str) -> None:
    network = Small().to(torch.bfloat16)
    inputs = draw_inputs(torch.bfloat16)
    adapters, run = small_adapters(network, KINDS.get(kind, BUTTERFLY), moved=0.1)
    assert {tensor.dtype for tensor in adapters.tensors.values()} == {torch.float32}
    precise, exact = small_adapters(network.double(), KINDS.get(kind, BUTTERFLY), moved=0.0)
    for name, tensor in precise.tensors.items():
        tensor.copy_(adapters.tensors[name])
    ours, expected = run(inputs), exact(inputs.double())
    assert ours.dtype == torch.bfloat16
    # Three products and sums, each to 8 bits.
    assert (ours - expected).abs().max() <= 3 * 2**-8 * expected.abs().max()
    loss_of(ours).backward()
    loss_of(expected).backward()
    for name, values in adapters.values.items():
        for part, value in values.items():
            grad, precise_grad = value.grad, precise.values[name][part].grad
            assert grad is not None and precise_grad is not None
            assert (grad - precise_grad).norm() <= 0.03 * precise_grad.norm(), (name, part)


@all_but_oft_slow
def test_base_pass_is_the_networks(family_float64: Family, kind: str) -> None:
    before = prediction_of(family_float64.network)
    config = KINDS["oft" if kind == "oft, blocks" else kind]
    adapters = adapters_for(family_float64, config)
    with adapters.base():
        base = prediction_of(family_float64.network)
    torch.testing.assert_close(base, before, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(prediction_of(family_float64.network), before)


@every_kind
def test_nothing_reads_the_host(kind: str) -> None:
    _, run = small_adapters(Small(), KINDS[kind])
    inputs = draw_inputs()
    with ForbidHostReads():
        run(inputs).sum().backward()


def test_values_are_those_of_the_seed() -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        adapters, _ = small_adapters(Small(), KINDS["loha"], moved=0.0, seed=seed)
        return adapters.tensors

    state = torch.get_rng_state()
    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first["attn1.to_q.hada_w1_a"], other["attn1.to_q.hada_w1_a"])
    assert not torch.equal(first["attn1.to_q.hada_w1_a"], first["attn1.to_k.hada_w1_a"])


@pytest.mark.parametrize("config", [LohaConfig(rank=32), LokrConfig(rank=2), DoraConfig(rank=32)])
def test_initial_values_have_the_spread_of_pefts(config: AdapterConfig) -> None:
    adapters, _ = small_adapters(Small(), config, moved=0.0)
    drawn = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "lokr_w2_a", "lokr_w2_b", "lora_A.weight")
    for name, tensor in adapters.tensors.items():
        if name.endswith(drawn):
            bound = tensor.shape[1] ** -0.5
            assert 0.8 * bound < tensor.abs().max() <= bound, name
            # Uniform in +-bound: standard deviation bound / sqrt(3).
            assert abs(tensor.std() * 3**0.5 / bound - 1) < (0.06 if tensor.numel() > 500 else 0.5)
        elif not name.endswith("magnitude_vector"):
            assert tensor.abs().max() == 0, name


def test_held_rotations_go_to_their_limit_and_no_further() -> None:
    tuner = make_tuner(OftConfig(num_blocks=4, constraint=1e-3))
    radius = 1e-3 * 16**2 / 2
    triangles = torch.randn(4, 120, generator=torch.Generator().manual_seed(0))
    triangles[0] *= 1e-4
    values = {"oft_R.weight": triangles.clone()}
    tuner.hold_(values, torch.tensor(True))
    assert torch.equal(values["oft_R.weight"], triangles)
    tuner.hold_(values, torch.tensor(False))
    held = values["oft_R.weight"]
    assert torch.equal(held[0], triangles[0])
    for block, before in zip(held[1:], triangles[1:], strict=True):
        skew = torch.zeros(16, 16)
        skew[tuple(torch.triu_indices(16, 16, 1))] = block
        assert (skew - skew.T).norm() == pytest.approx(radius, rel=1e-5)
        torch.testing.assert_close(block / block.norm(), before / before.norm())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (OftConfig(block_size=48), r"block_size is 48, which does not divide the 64 inputs of "),
        (OftConfig(num_blocks=5), r"num_blocks is 5, which .* divides those of all: 2, 4, 8, 16$"),
        (OftConfig(num_blocks=16), None),
        (
            OftConfig(num_blocks=48, targets=["*.to_q"]),
            r"48 blocks of the 48 inputs of attn1.to_q .* set it to 24 or less",
        ),
        (BoftConfig(block_size=3, factors=2), r"block_size: 3 has no halves"),
        (BoftConfig(block_size=4, factors=9), r"factors - 1\) is 1024, which does not divide"),
        (LohaConfig(targets=["*.to_qq"]), r"targets: '\*.to_qq' matches no attention projection"),
    ],
)
def test_what_does_not_fit_is_refused(config: AdapterConfig, words: str | None) -> None:
    refused = nullcontext() if words is None else pytest.raises(UserError, match=words)
    with refused:
        small_adapters(Small(), config)


def test_blocks_are_said_in_one_way() -> None:
    with pytest.raises(ValueError, match="say the same in two ways"):
        OftConfig(block_size=8, num_blocks=4)
