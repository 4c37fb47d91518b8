"""Adapters of a foreign network: found, taken out of a base pass, and listed for the anchor."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from torch import Tensor, nn
from torch.distributed import HashStore, destroy_process_group, init_process_group

from fastppt.backend import attach, lora_pairs
from fastppt.foreign.adapters import own_projections
from fastppt_kernels import AnchoredAdamW
from tests.backend.foreign_networks import (
    ADAPTERS,
    PROJECTIONS,
    RANK,
    Passes,
    ScriptsLora,
    linears_of,
    make_passes,
    randomize,
    with_modules,
    with_peft,
)


def base_and_tuned(network: nn.Module, passes: Passes, **settings: Any) -> tuple[Tensor, Tensor]:
    """What a base pass predicts, and a tuned one after it, of the same text."""
    with attach(network, attentions=[], **settings) as attached:
        with attached.base():
            base = network(**passes.base).sample
        tuned = network(**passes.base).sample
        attached.losses()
    return base, tuned


def never_adapted(passes: Passes) -> Tensor:
    with torch.no_grad():
        prediction: Tensor = passes.network(**passes.base).sample
    return prediction


def assert_base(network: nn.Module, passes: Passes, wanted: Tensor, **settings: Any) -> None:
    """Assert that base passes are those of the network without adapters, and tuned ones not."""
    flags = [parameter.requires_grad for parameter in network.parameters()]
    base, tuned = base_and_tuned(network, passes, **settings)
    assert torch.equal(base, wanted)
    assert (tuned - wanted).abs().max() > 1e-3
    assert [parameter.requires_grad for parameter in network.parameters()] == flags


PEFT_KINDS: dict[str, Callable[[], Any]] = {
    "DoRA": lambda: peft.LoraConfig(r=RANK, target_modules=[*PROJECTIONS], use_dora=True),
    "LoHa": lambda: peft.LoHaConfig(r=RANK, target_modules=[*PROJECTIONS]),
    "convolutions": lambda: peft.LoraConfig(r=RANK, target_modules=["conv1", "proj_in"]),
    "modules to save": lambda: peft.LoraConfig(
        r=RANK, target_modules=["to_q"], modules_to_save=["conv_out"]
    ),
}


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_all_that_peft_trains_is_left_out_of_a_base_pass(kind: str) -> None:
    passes = make_passes(dtype=torch.float32)
    wanted = never_adapted(passes)
    network = peft.get_peft_model(passes.network, PEFT_KINDS[kind]())
    randomize([parameter for parameter in network.parameters() if parameter.requires_grad])
    assert_base(network, passes, wanted)


def test_adapters_from_load_lora_weights_are_left_out(tmp_path: Path) -> None:
    passes = make_passes(dtype=torch.float32)
    wanted = never_adapted(passes)
    source = with_peft(copy.deepcopy(passes.network)).network
    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(source))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    pipeline = StableDiffusionPipeline(
        unet=passes.network,
        scheduler=DDPMScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(tmp_path)
    assert_base(pipeline.unet, passes, wanted)


def test_adapters_upon_adapters_are_left_out_together() -> None:
    passes = make_passes(dtype=torch.float32)
    wanted = never_adapted(passes)
    with_modules(passes.network, ScriptsLora)
    ADAPTERS["OneTrainer"](passes.network)
    with_peft(passes.network)
    assert_base(passes.network, passes, wanted)


class Checkpoint(nn.Module):
    """What puts a `forward` on a block and holds nothing, as OneTrainer's checkpointing does."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.orig_forward, self.calls = block.forward, 0
        block.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.orig_forward(*args, **kwargs)


def test_a_forward_that_adds_nothing_of_its_own_stays_in_a_base_pass() -> None:
    passes = make_passes(dtype=torch.float32)
    wanted = never_adapted(passes)
    ADAPTERS["OneTrainer"](passes.network)
    pairs = len(lora_pairs(passes.network))
    block = Checkpoint(passes.network.mid_block)
    assert_base(passes.network, passes, wanted)
    assert block.calls > 0
    assert len(lora_pairs(passes.network)) == pairs


def test_an_adapter_below_a_forward_that_must_stay_is_refused() -> None:
    network = make_passes(dtype=torch.float32).network
    ADAPTERS["OneTrainer"](network)
    name, layer = next(iter(linears_of(network).items()))
    Checkpoint(layer)
    with pytest.raises(ValueError, match=f"^{name}: .* that of a Checkpoint.*pass switch="):
        attach(network)


@pytest.mark.parametrize("hook_first", [True, False])
def test_hooks_of_accelerate_around_a_layer_are_no_adapters(hook_first: bool) -> None:
    passes = make_passes(dtype=torch.float32)
    wanted = never_adapted(passes)
    layers = linears_of(passes.network).values()
    add_adapters = lambda: with_modules(passes.network, ScriptsLora)  # noqa: E731
    if not hook_first:
        add_adapters()
    for layer in layers:
        add_hook_to_module(layer, ModelHook())
    if hook_first:
        add_adapters()
    assert_base(passes.network, passes, wanted)


def prepared(network: nn.Module) -> nn.Module:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    outer: nn.Module = accelerator.prepare(network)
    return outer


@contextmanager
def process_group() -> Iterator[None]:
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "accelerate": prepared,
    "DataParallel": nn.DataParallel,
    "DDP": nn.parallel.DistributedDataParallel,
    "compile": lambda network: torch.compile(network, backend="eager"),
    "compile in DDP": lambda network: nn.parallel.DistributedDataParallel(
        torch.compile(network, backend="eager")
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_is_wrapped_is_attached_to_inside(wrapper: str) -> None:
    passes = make_passes(dtype=torch.float32)
    inner = with_peft(passes.network).network
    with process_group():
        outer = WRAPPERS[wrapper](inner)
        with attach(outer) as attached:
            assert attached.attentions
            with pytest.raises(ValueError, match="is attached to already"):
                attach(inner)
            if not wrapper.startswith("compile"):
                with attached.base():
                    outer(**passes.base)
                outer(**passes.tuned)
                assert attached.losses().total > 0


def test_weights_that_train_themselves_are_exchanged_for_their_base_values() -> None:
    passes = make_passes(dtype=torch.float32)
    wanted = never_adapted(passes)
    network = passes.network
    trained = {name: p for name, p in network.named_parameters() if "attn2" in name}
    base_weights = {name: parameter.detach().clone() for name, parameter in trained.items()}
    randomize([*trained.values()])
    for parameter in trained.values():
        parameter.requires_grad_()
    assert_base(network, passes, wanted, base_weights=base_weights)
    assert all(dict(network.named_parameters())[name] is trained[name] for name in trained)
    # And beside adapters.
    adapted = with_peft(network, targets=["attn1.to_q"])
    for parameter in trained.values():
        parameter.requires_grad_()
    assert_base(adapted.network, passes, wanted, base_weights=base_weights)


def test_unknown_adapters_are_left_out_by_a_switch_of_the_user() -> None:
    passes = make_passes(dtype=torch.float32)
    wanted = never_adapted(passes)
    layer = passes.network.get_submodule("mid_block.attentions.0.proj_in")
    is_on = [True]
    stock = layer.forward
    layer.forward = lambda inputs: stock(inputs) * (1.5 if is_on[0] else 1.0)
    with pytest.raises(ValueError, match=r"mid_block\.attentions\.0\.proj_in: .* pass switch="):
        attach(passes.network)

    @contextmanager
    def switch() -> Iterator[None]:
        is_on[0] = False
        yield
        is_on[0] = True

    # Something must have a gradient.
    layer.requires_grad_()
    assert_base(passes.network, passes, wanted, switch=switch)


def with_trained_biases(network: nn.Module) -> nn.Module:
    return with_peft(network, bias="all").network


def merged(network: nn.Module) -> nn.Module:
    adapted = with_peft(network).network
    adapted.fuse_lora()
    return adapted


def rebound(network: nn.Module) -> nn.Module:
    with_modules(network, ScriptsLora)
    layer = network.get_submodule("conv_in")
    layer.forward = types.MethodType(lambda self, inputs: inputs, layer)
    return network


WRONG: dict[str, tuple[Callable[[nn.Module], nn.Module], dict[str, Any], str]] = {
    "no adapters": (lambda network: network, {}, r"has no adapters.*pass base_weights="),
    "trained biases": (with_trained_biases, {}, r"bias and \d+ other parameters train"),
    "merged": (merged, {}, r"to_q: adapter 'default' is merged .*unfuse_lora"),
    "rebound": (rebound, {}, "conv_in: its forward is"),
    "trained": (lambda n: n.requires_grad_(True), {}, "has no adapters"),
    "no such weight": (lambda n: n, {"base_weights": {"x": torch.ones(1)}}, "'x' is no parameter"),
    "other weight": (
        lambda n: n,
        {"base_weights": {"conv_in.bias": torch.ones(3)}},
        r"'conv_in.bias' is \(\(3,\), .* want \(\(16,\)",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_taken_out_is_refused(wrong: str) -> None:
    change, settings, message = WRONG[wrong]
    network = change(make_passes(dtype=torch.float32).network)
    with pytest.raises(ValueError, match=message):
        attach(network, **settings)


def test_adapters_of_a_second_kind_that_came_later_are_left_out() -> None:
    passes = make_passes(dtype=torch.float32)
    wanted = never_adapted(passes)
    network = with_peft(passes.network, targets=["attn2.to_q"]).network
    with attach(network) as attached:
        with_modules(network, ScriptsLora)
        with attached.base():
            base = network(**passes.base).sample
    assert torch.equal(base, wanted)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_pairs_are_the_trained_tensors_and_serve_the_effective_anchor(kind: str) -> None:
    adapted = ADAPTERS[kind](make_passes(dtype=torch.float32).network)
    pairs = lora_pairs(adapted.network)
    assert len(pairs) == len(adapted.pairs) == len(linears_of(make_passes().network))
    for (down, up, scale), (name, *wanted, wanted_scale) in zip(pairs, adapted.pairs, strict=True):
        for ours, theirs in zip((down, up), wanted, strict=True):
            assert ours.data_ptr() == theirs.data_ptr(), name
            assert torch.equal(ours, theirs), name
        assert scale == wanted_scale, name
    parameters = [*adapted.parameters.values()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = AnchoredAdamW(
        [{"params": parameters, "lora_pairs": pairs}],
        lr=0.0,
        anchor_weight=1.0,
        anchor="zero",
        form="effective",
    )
    optimizer.step()
    wanted_penalty = sum(
        (scale * up.double() @ down.double()).square().sum() for _, down, up, scale in adapted.pairs
    )
    assert float(optimizer.penalty) == pytest.approx(float(wanted_penalty), rel=1e-5)


def test_a_pair_of_a_convolution_is_its_matrix() -> None:
    network = make_passes(dtype=torch.float32).network
    network = peft.get_peft_model(network, PEFT_KINDS["convolutions"]())
    randomize([parameter for parameter in network.parameters() if parameter.requires_grad])
    layer = network.get_submodule("base_model.model.mid_block.resnets.0.conv1")
    wanted = layer.get_delta_weight("default")
    changes = {down.data_ptr(): scale * up @ down for down, up, scale in lora_pairs(network)}
    change = changes[layer.lora_A["default"].weight.data_ptr()]
    assert torch.allclose(change, wanted.flatten(1), atol=1e-6)


def test_frozen_adapters_are_no_pairs() -> None:
    network: Any = with_peft(make_passes(dtype=torch.float32).network).network
    wanted = len(lora_pairs(network))
    network.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), adapter_name="other")
    network.set_adapter(["default", "other"])
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".default." in name)
    assert len(lora_pairs(network)) == wanted
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".other." in name)
    assert {down.shape[0] for down, _, _ in lora_pairs(network)} == {2}


@pytest.mark.parametrize("kind", ["sd-scripts", "OneTrainer", "ours"])
def test_frozen_adapters_of_layers_are_no_pairs(kind: str) -> None:
    adapted = ADAPTERS[kind](make_passes(dtype=torch.float32).network)
    frozen = [*adapted.parameters.values()][:2]
    wanted = [down.data_ptr() for _, down, _, _ in adapted.pairs[1:]]
    if kind == "ours":
        # Query, key and value of the first attention share an adapter.
        group = next(g for m in adapted.network.modules() for g in own_projections(m))
        frozen, wanted = [group.adapter.down, group.adapter.up], wanted[2:]
    for parameter in frozen:
        parameter.requires_grad_(False)
    assert [down.data_ptr() for down, _, _ in lora_pairs(adapted.network)] == wanted


def test_the_multiplier_of_a_module_is_part_of_its_scale() -> None:
    network = make_passes(dtype=torch.float32).network
    adapter = ScriptsLora(next(iter(linears_of(network).values())))
    adapter.multiplier = 0.25
    ((_, _, scale),) = lora_pairs(network)
    assert scale == 0.125


def channels_last(network: nn.Module) -> nn.Module:
    adapted = peft.get_peft_model(network, PEFT_KINDS["convolutions"]())
    return adapted.to(memory_format=torch.channels_last)


NO_PAIRS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "none": (lambda network: network, "trains no LoRA"),
    "DoRA": (lambda n: peft.get_peft_model(n, PEFT_KINDS["DoRA"]()), "lora_magnitude_vector"),
    "LoHa": (lambda n: peft.get_peft_model(n, PEFT_KINDS["LoHa"]()), "hada_w1_a.*form=.raw"),
    "channels_last": (channels_last, "make it contiguous"),
}


@pytest.mark.parametrize("wrong", NO_PAIRS)
def test_what_is_no_pair_is_refused(wrong: str) -> None:
    change, message = NO_PAIRS[wrong]
    with pytest.raises(ValueError, match=message):
        lora_pairs(change(make_passes(dtype=torch.float32).network))
