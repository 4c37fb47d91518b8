import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.step_costs import count_flops
from bench.step_ways import (
    PEERS,
    NetworkAlone,
    TrainerStep,
    Work,
    check_peer,
    make_peer,
    open_source,
)

MINI_MODELS = ("mini-sd", "mini-sdxl", "mini-sd3")
# Families round the VAE's scale to float32.
EXACT = 1e-7
NEVER_NARROW = [("mini-sdxl", torch.float32), ("mini-sd3", torch.float32)]


@pytest.fixture
def open_model(photos):
    def open_(model, dtype=torch.float64, batch_size=2):
        source = open_source(Work(model, batch_size, rank=4), "cpu", photos, dtype)
        return source, TrainerStep(source, "lora", "eager")

    return open_


@pytest.mark.parametrize("model", MINI_MODELS)
def test_loss_and_gradients_of_the_peer_are_ours_on_the_same_draws(open_model, model):
    source, ours = open_model(model)
    for options in PEERS.values():
        peer = make_peer(source, ours, **options)
        errors = check_peer(peer, ours)
        assert errors["loss"] < EXACT
        assert errors["gradients"] < EXACT


def leave_one_out(peer):
    layers = [module for module in peer.network.modules() if hasattr(module, "lora_B")]
    layers[-1].scaling["default"] = 0.0


def see_another_prompt(peer):
    embeddings = peer.subject.embeddings
    embeddings.tokens.copy_(embeddings.tokens.flip(0))


def scale_the_latents(peer):
    peer.subject.pipeline.vae.register_to_config(scaling_factor=1.1)


@pytest.mark.parametrize("fault", [leave_one_out, see_another_prompt, scale_the_latents])
def test_a_fault_in_the_peer_shows(open_model, fault):
    source, ours = open_model("mini-sdxl")
    peer = make_peer(source, ours)
    fault(peer)
    assert max(check_peer(peer, ours).values()) > 1e-4


def test_a_checked_peer_starts_with_new_adapters_and_our_options(open_model):
    source, ours = open_model("mini-sd3")
    peer = make_peer(source, ours, prior=True)
    check_peer(peer, ours)
    assert peer.precondition and peer.rows == [0, 1]
    assert all(float(pair.up.abs().sum()) == 0 for pair in ours.trainables.lora.pairs)
    assert all(parameter.grad is None for parameter in peer.parameters)
    for pair in ours.trainables.lora.pairs:
        layer = peer.network.get_submodule(pair.name)
        assert float(layer.lora_B["default"].weight.detach().abs().sum()) == 0


def test_a_step_of_the_peer_moves_all_its_adapters(open_model):
    source, ours = open_model("mini-sd3", torch.float32)
    peer = make_peer(source, ours, prior=True)
    ours.set_ups(0.02)
    peer.load(ours.trainables.lora.pairs)
    before = [parameter.detach().clone() for parameter in peer.parameters]
    assert isinstance(peer(), float)
    moved = [not torch.equal(*pair) for pair in zip(before, peer.parameters, strict=True)]
    assert all(moved) and len(moved) == 2 * len(ours.trainables.lora.pairs)
    assert all(parameter.grad is None for parameter in peer.parameters)


class Lookups(TorchDispatchMode):
    """Notes the shape of each tensor that is looked up by a list."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index.Tensor:
            self.shapes.append(args[0].shape)
        return func(*args, **(kwargs or {}))


def test_the_peer_does_not_go_through_all_parameters_for_a_device(open_model, monkeypatch):
    source, ours = open_model("mini-sdxl", torch.float32)
    peer = make_peer(source, ours)

    def refuse(vae):
        raise AssertionError("the scripts never ask the VAE where it is")

    monkeypatch.setattr(type(peer.subject.pipeline.vae), "device", property(refuse))
    assert peer() > 0


def test_the_peer_repeats_its_prompts_without_a_list_that_a_gpu_would_wait_for(open_model):
    source, ours = open_model("mini-sdxl", torch.float32)
    peer = make_peer(source, ours, prior=True)
    peer.batch_size = 2
    prompts = peer.subject.embeddings
    with Lookups() as seen:
        tokens = peer._repeat(prompts.tokens)
        peer()
    assert torch.equal(tokens, prompts.tokens[[0, 0, 1, 1]])
    assert seen.shapes and not {prompts.tokens.shape, prompts.pooled.shape} & {*seen.shapes}


@pytest.mark.slow
def test_cached_latents_save_the_vae_and_prior_preservation_doubles_the_network(open_model):
    source, ours = open_model("mini-sdxl", torch.float32, batch_size=1)
    ours_flops = count_flops(ours.gradients)
    flops = {name: count_flops(make_peer(source, ours, **o)) for name, o in PEERS.items()}
    vae_flops = flops["diffusers-style"] - ours_flops
    assert vae_flops > 0
    assert flops["diffusers-style, latents cached"] == ours_flops
    assert flops["diffusers-style, prior preservation"] == 2 * (ours_flops + vae_flops)


def test_the_network_alone_goes_back_to_its_first_attention_and_no_further(open_model):
    source, ours = open_model("mini-sdxl", torch.float32, batch_size=1)
    alone = NetworkAlone(source.make_family(), ours, backward=True)
    to_attention = count_flops(alone)
    alone.batch.noisy.requires_grad_()
    to_latents = count_flops(alone)
    alone.backward = False
    assert count_flops(alone) < to_attention < to_latents
    assert to_attention < count_flops(ours.gradients)
    assert all(parameter.grad is None for parameter in alone.family.network.parameters())


@pytest.mark.parametrize(("model", "dtype"), [("mini-sd", torch.bfloat16), *NEVER_NARROW])
def test_vae_and_adapters_have_the_types_that_the_script_gives_them(open_model, model, dtype):
    source, ours = open_model(model, torch.bfloat16, batch_size=1)
    peer = make_peer(source, ours)
    assert peer.subject.pipeline.vae.dtype == dtype
    assert {parameter.dtype for parameter in peer.parameters} == {torch.bfloat16}
    assert max(check_peer(peer, ours).values()) < 0.2
