"""A network's own weights in one arena: which, where they lie, and the base beside them."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.trainables.network_weights import NetworkWeights


def load(model: str, dtype: torch.dtype | None = None) -> Family:
    return load_family(ModelConfig(path=model, device="cpu"), dtype=dtype)


@pytest.fixture
def family() -> Family:
    return load("mini-sd3")


def predict(family: Family) -> Tensor:
    chance = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 16, 16, generator=chance, dtype=family.dtype)
    prompts = family.encode_prompts(["a photo of a dog"])
    with torch.no_grad():
        sizes = torch.zeros(1, 6)
        return family.predict(latents, torch.tensor([500]), prompts, sizes).clone()


def move(weights: NetworkWeights) -> None:
    with torch.no_grad():
        weights.arena.flat += 0.1 * (weights.arena.flat != 0)
    weights.refresh()


# Which.


@pytest.mark.parametrize("model", ["mini-sd", "mini-sdxl", "mini-sd3"])
def test_the_texts_keys_and_values_are_chosen_in_every_family(model: str) -> None:
    family = load(model)
    wanted: set[str] = set()
    for name, module in family.network.named_modules():
        if isinstance(module, Attention) and module.added_kv_proj_dim is not None:
            ends = ("add_k_proj.weight", "add_k_proj.bias", "add_v_proj.weight", "add_v_proj.bias")
            wanted |= {f"{name}.{end}" for end in ends}
        elif isinstance(module, Attention) and module.is_cross_attention:
            wanted |= {f"{name}.to_k.weight", f"{name}.to_v.weight"}
    weights = NetworkWeights(family.network, family.text_weights)
    assert wanted and weights.tensors.keys() == wanted


def test_patterns_choose_parameters_and_the_others_stay_frozen(family: Family) -> None:
    weights = NetworkWeights(family.network, ["*.norm1.*", "proj_out.bias"])
    weights.arena.require_grad(True)
    moving = {name for name, p in family.network.named_parameters() if p.requires_grad}
    assert moving == weights.tensors.keys()
    assert "proj_out.bias" in moving and "transformer_blocks.0.norm1.linear.bias" in moving
    assert not any("attn" in name for name in moving)
    weights.arena.require_grad(False)
    assert not any(p.requires_grad for p in family.network.parameters())


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest(family: Family) -> None:
    message = r"stage\.0\.trainables\.full\.targets: 'proj_out\.weigth' matches no parameter; .*"
    with pytest.raises(UserError, match=message + r"proj_out\.weight"):
        NetworkWeights(family.network, ["proj_out.bias", "proj_out.weigth"])


# Where they lie.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master_weights", [True, False])
def test_the_network_is_the_same_and_made_of_views(
    dtype: torch.dtype, master_weights: bool
) -> None:
    family = load("mini-sd3", dtype)
    before, state = predict(family), family.network.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    weights = NetworkWeights(family.network, None, master_weights=master_weights)
    assert torch.equal(predict(family), before)
    for name, tensor in family.network.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, kept[name]), name
    arena = weights.arena
    narrow = dtype != torch.float32
    assert arena.flat.dtype == (torch.float32 if master_weights else dtype)
    assert (arena.working_copy is not None) == (narrow and master_weights)
    assert weights.rounds_stochastically == (narrow and not master_weights)
    seen = arena.flat if arena.working_copy is None else arena.working_copy
    storages = {p.untyped_storage().data_ptr() for p in family.network.parameters()}
    assert storages == {seen.untyped_storage().data_ptr()}
    # 6e-8 is the least that float16 holds, and its gradients are yet to be divided.
    assert arena.grad.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    for name, values in weights.tensors.items():
        assert torch.equal(values.to(dtype), kept[name]), name
    move(weights)
    assert not torch.equal(predict(family), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_added_up_in_place(dtype: torch.dtype) -> None:
    network = nn.Linear(5, 3).to(dtype)
    weights = NetworkWeights(network, None)
    weights.arena.require_grad(True)
    place = network.weight.grad.data_ptr()
    inputs = torch.ones(2, 5, dtype=dtype)
    for _ in range(3):
        network(inputs).sum().backward()
    assert network.weight.grad.data_ptr() == place == weights.arena.grad.data_ptr()
    assert network.weight.dtype == dtype
    assert (network.weight.grad == 6).all() and (network.bias.grad == 6).all()
    assert weights.arena.grad.sum() == 6 * 18


# The base.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_the_pretrained_network_bit_for_bit(dtype: torch.dtype) -> None:
    family = load("mini-sd3", dtype)
    before = predict(family)
    parameters = dict(family.network.named_parameters())
    weights = NetworkWeights(family.network, None, kept="device")
    assert weights.pretrained.dtype == dtype
    move(weights)
    tuned = predict(family)
    assert not torch.equal(tuned, before)
    with weights.base():
        assert torch.equal(predict(family), before)
    assert torch.equal(predict(family), tuned)
    assert dict(family.network.named_parameters()) == parameters


def test_the_tuned_network_is_back_after_an_error_in_the_base(family: Family) -> None:
    weights = NetworkWeights(family.network, None, kept="device")
    move(weights)
    tuned = predict(family)
    with pytest.raises(RuntimeError, match="in the pass"), weights.base():
        raise RuntimeError("in the pass")
    assert torch.equal(predict(family), tuned)


def test_a_parameter_that_two_modules_share_is_the_bases_in_both() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[1].weight = network[0].weight
    inputs = torch.randn(3, 4)
    before = network(inputs)
    weights = NetworkWeights(network, ["*.weight"], kept="device")
    assert weights.tensors.keys() == {"0.weight"}
    move(weights)
    with weights.base():
        assert torch.equal(network(inputs), before)


def test_nothing_is_kept_where_nothing_asks_for_it(family: Family) -> None:
    weights = NetworkWeights(family.network, None)
    assert weights.pretrained is None
    before = predict(family)
    with weights.base():
        assert torch.equal(predict(family), before)


def test_what_is_kept_in_host_memory_is_the_pretrained_weights(family: Family) -> None:
    weights = NetworkWeights(family.network, None, kept="host")
    before = weights.arena.flat.detach().clone()
    move(weights)
    assert torch.equal(weights.pretrained, before) and weights.pretrained.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", ["device", "host"])
def test_pretrained_weights_lie_where_they_are_asked_to_on_a_gpu(
    dtype: torch.dtype, kept: str
) -> None:
    network = nn.Linear(100, 70).to("cuda", dtype)
    before = network.weight.detach().clone()
    weights = NetworkWeights(network, None, kept=kept)
    assert weights.pretrained.is_pinned() == (kept == "host")
    assert weights.pretrained.is_cuda == (kept == "device")
    assert torch.equal(weights.pretrained[:7000].view(70, 100).cuda(), before)
    assert weights.pretrained.dtype == dtype


def test_on_the_meta_device_all_of_it_is_made_without_memory() -> None:
    network = nn.Linear(100, 70, device="meta", dtype=torch.bfloat16)
    for kept in (None, "device", "host"):
        weights = NetworkWeights(network, None, kept=kept)
        held = [weights.arena.flat, weights.arena.grad, weights.arena.working_copy]
        held += [] if kept is None else [weights.pretrained]
        assert all(tensor.is_meta for tensor in held)
