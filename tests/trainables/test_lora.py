"""Our adapters are peft's, to the last digits of float64, and refuse what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from fastppt.config import ModelConfig, RunConfig
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.mini import build_mini
from fastppt.mini.sdxl import LATENT_CHANNELS, TEXT_WIDTH_2
from fastppt.objectives.anchor import anchored_group
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables_config import LoraConfig
from fastppt.training.build import build_trainables
from fastppt_kernels import AnchoredAdamW

ALL = ["*.to_q", "*.to_k", "*.to_v", "*.to_out.0"]


def adapters_for(family: Family, config: LoraConfig) -> LoraAdapters:
    """Adapters with values that are not zero anywhere."""
    adapters = LoraAdapters(
        family.make_adaptable(), config, seed=0, device=family.device, dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(3)
    for pair in adapters.pairs:
        pair.up.copy_(torch.randn(pair.up.shape, generator=generator, dtype=torch.float64))
    return adapters


def loss_of(network: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    conditions = {"text_embeds": draw(2, TEXT_WIDTH_2), "time_ids": draw(2, 6)}
    prediction = network(
        draw(2, LATENT_CHANNELS, 16, 16),
        torch.tensor([5, 900]),
        draw(2, 24, 128),
        added_cond_kwargs=conditions,
    ).sample
    return (prediction * draw(*prediction.shape)).sum()


def peft_network(adapters: LoraAdapters, targets: list[str]) -> torch.nn.Module:
    network = build_mini("mini-sdxl").unet.double().requires_grad_(False)
    config = peft.LoraConfig(r=adapters.rank, lora_alpha=adapters.alpha, target_modules=targets)
    network.add_adapter(config)
    modules = dict(network.named_modules())
    for pair in adapters.pairs:
        layer = modules[pair.name]
        layer.lora_A["default"].weight.data = pair.down.clone()
        layer.lora_B["default"].weight.data = pair.up.clone()
    return network


@pytest.mark.parametrize(
    ("rank", "alpha", "targets"),
    [
        (4, None, ["to_q", "to_k", "to_v", "to_out.0"]),
        (3, 7.0, ["to_q", "to_k", "to_v", "to_out.0"]),
        (2, 1.0, ["to_q", "to_v"]),
        (2, None, ["to_k"]),
        (1, None, ["to_out.0"]),
    ],
)
def test_forward_and_gradients_equal_those_of_peft(
    family_float64: Family, rank: int, alpha: float | None, targets: list[str]
) -> None:
    config = LoraConfig(rank=rank, alpha=alpha, targets=[f"*.{target}" for target in targets])
    adapters = adapters_for(family_float64, config)
    theirs = peft_network(adapters, targets)
    our_loss, their_loss = loss_of(family_float64.network), loss_of(theirs)
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-9, atol=0)
    our_loss.backward()
    their_loss.backward()
    modules = dict(theirs.named_modules())
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == len(adapters.pairs)
    grads = grads_by_name(adapters)
    for name, (down_grad, up_grad) in grads.items():
        layer = modules[name]
        for ours, parameter in (
            (down_grad, layer.lora_A["default"].weight),
            (up_grad, layer.lora_B["default"].weight),
        ):
            assert ours.abs().max() > 0, name
            scale = parameter.grad.abs().max()
            assert (ours - parameter.grad).abs().max() <= 1e-9 * scale, name


def grads_by_name(adapters: LoraAdapters) -> dict[str, tuple[Tensor, Tensor]]:
    """The gradient of each pair, cut out of the flat gradient at the pair's own place."""

    def grad(view: Tensor) -> Tensor:
        start = view.storage_offset()
        return adapters.arena.grad[start : start + view.numel()].view(view.shape)

    return {pair.name: (grad(pair.down), grad(pair.up)) for pair in adapters.pairs}


def test_new_adapters_change_nothing(family_float64: Family) -> None:
    before = loss_of(family_float64.network)
    LoraAdapters(
        family_float64.make_adaptable(),
        LoraConfig(rank=4),
        seed=0,
        device=family_float64.device,
        dtype=torch.float64,
    )
    torch.testing.assert_close(loss_of(family_float64.network), before, rtol=1e-12, atol=0)


def test_down_projections_start_as_pefts_do(family: Family) -> None:
    adapters = LoraAdapters(
        family.make_adaptable(), LoraConfig(rank=64), seed=0, device=family.device
    )
    for pair in adapters.pairs:
        bound = pair.down.shape[1] ** -0.5
        assert pair.down.abs().max() <= bound
        # Uniform in +-bound: standard deviation bound / sqrt(3).
        assert abs(pair.down.std() * 3**0.5 / bound - 1) < 0.05
        assert pair.up.abs().max() == 0


def test_targets_choose_projections_by_their_whole_path(family: Family) -> None:
    config = LoraConfig(rank=1, targets=["up_blocks.*.attn2.to_k"])
    adapters = LoraAdapters(family.make_adaptable(), config, seed=0, device=family.device)
    names = [pair.name for pair in adapters.pairs]
    assert names
    assert all(name.startswith("up_blocks.") and name.endswith("attn2.to_k") for name in names)


def test_target_that_matches_nothing_names_the_nearest(family: Family) -> None:
    with pytest.raises(UserError, match=r"matches no attention projection; the nearest are .*to_q"):
        LoraAdapters(
            family.make_adaptable(), LoraConfig(targets=["*.to_qq"]), seed=0, device=family.device
        )


def test_number_of_parameters_is_that_of_the_pairs(family: Family) -> None:
    adapters = LoraAdapters(
        family.make_adaptable(), LoraConfig(rank=3), seed=0, device=family.device
    )
    counted = sum(3 * (pair.down.shape[1] + pair.up.shape[0]) for pair in adapters.pairs)
    assert adapters.num_parameters == counted
    # Every attention has q, k, v and out.
    assert len(adapters.pairs) == 4 * sum(
        type(module).__name__ == "Attention" for module in family.network.modules()
    )


def weights_of(adapters: LoraAdapters) -> dict[str, tuple[Tensor, Tensor, float]]:
    return {pair.name: (pair.down.clone(), pair.up.clone(), pair.scale) for pair in adapters.pairs}


def test_loaded_adapters_add_the_same_under_another_alpha(family_float64: Family) -> None:
    weights = weights_of(adapters_for(family_float64, LoraConfig(rank=2, alpha=3.0)))
    adapters = adapters_for(family_float64, LoraConfig(rank=2, alpha=1.0))
    adapters.load(weights)
    for pair in adapters.pairs:
        down, up, scale = weights[pair.name]
        torch.testing.assert_close(pair.scale * pair.up @ pair.down, scale * up @ down)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.update(other=next(iter(weights.values()))), "none here"),
        (lambda weights: weights.popitem(), "none in the file"),
        (
            lambda weights: weights.update(
                {k: (d[:1], u[:, :1], s) for k, (d, u, s) in weights.items()}
            ),
            "rank 1 in the file and 2 here; set stage.0.trainables.lora.rank to 1",
        ),
        (
            lambda weights: weights.update(
                {k: (d[:, :-1], u, s) for k, (d, u, s) in weights.items()}
            ),
            "made for another model",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused_and_nothing_written(
    family_float64: Family, change, message: str
) -> None:
    adapters = adapters_for(family_float64, LoraConfig(rank=2))
    weights = weights_of(adapters)
    change(weights)
    before = adapters.arena.flat.detach().clone()
    with pytest.raises(UserError, match=message):
        adapters.load(weights)
    assert torch.equal(adapters.arena.flat, before)


def bf16_family() -> Family:
    return load_family(ModelConfig(path="mini-sdxl", device="cpu"), dtype=torch.bfloat16)


def test_loaded_values_reach_a_narrow_network() -> None:
    family = bf16_family()
    adapters = LoraAdapters(
        family.make_adaptable(), LoraConfig(rank=2), seed=0, device=family.device
    )
    weights = weights_of(adapters)
    generator = torch.Generator().manual_seed(3)
    ups = {k: torch.randn(up.shape, generator=generator) for k, (_, up, _) in weights.items()}
    adapters.load({k: (down, ups[k], scale) for k, (down, _, scale) in weights.items()})
    assert torch.equal(adapters.arena.working_copy, adapters.arena.flat.bfloat16())
    assert adapters.arena.flat.abs().max() > 1


def test_optimizer_writes_what_a_narrow_network_computes_with() -> None:
    family = bf16_family()
    adapters = LoraAdapters(
        family.make_adaptable(), LoraConfig(rank=2), seed=0, device=family.device
    )
    optimizer = AnchoredAdamW([anchored_group(adapters, torch.tensor(0.1), None)])
    before = adapters.arena.working_copy.clone()
    adapters.arena.grad.fill_(1.0)
    optimizer.step()
    assert torch.equal(adapters.arena.working_copy, adapters.arena.flat.detach().bfloat16())
    assert not torch.equal(adapters.arena.working_copy, before)


def test_network_with_adapters_is_saved_as_it_was(family: Family, tmp_path: Path) -> None:
    names = dict(family.network.named_parameters()).keys()
    before = {name: value.clone() for name, value in family.network.state_dict().items()}
    adapters = LoraAdapters(
        family.make_adaptable(), LoraConfig(rank=2), seed=0, device=family.device
    )
    assert dict(family.network.named_parameters()).keys() == names
    assert len({parameter.data_ptr() for parameter in family.network.parameters()}) == len(names)
    family.network.save_pretrained(tmp_path)
    saved = type(family.network).from_pretrained(tmp_path).state_dict()
    assert saved.keys() == before.keys() and len(adapters.pairs) > 0
    assert all(torch.equal(saved[name], before[name]) for name in before)


@pytest.mark.parametrize("model", ["mini-sd", "mini-sdxl", "mini-sd3"])
def test_up_takes_the_second_half_of_the_network(
    make_config: Callable[..., RunConfig], model: str
) -> None:
    config = make_config(**{"stage.0.trainables.lora.targets": "up", "model.path": model})
    family = load_family(config.model)
    trainables = build_trainables(config, family)
    adapters = trainables.lora
    adapted = {pair.name for pair in adapters.pairs}
    every = [name for group in family.make_adaptable() for name in group.names]
    blocks = sorted({name.split(".attn")[0] for name in every})
    late = [
        block
        for block in blocks
        if block.startswith("up_blocks.")
        or (model == "mini-sd3" and int(block.split(".")[1]) >= len(blocks) // 2)
    ]
    assert 0 < len(late) < len(blocks)
    assert adapted == {name for name in every if name.split(".attn")[0] in late}


def note_backward(
    name: str, names: list[str], module: torch.nn.Module, given: object, output: Tensor
) -> None:
    """A forward hook: note the name when the backward pass reaches the module's output."""
    if output.requires_grad:
        output.grad_fn.register_hook(lambda *_: names.append(name))


def test_backward_pass_of_up_does_not_reach_what_lies_before(
    make_config: Callable[..., RunConfig],
) -> None:
    reached = {}
    for targets in (None, "up"):
        settings = {} if targets is None else {"stage.0.trainables.lora.targets": targets}
        family = load_family(make_config().model, dtype=torch.float64)
        build_trainables(make_config(**settings), family, dtype=torch.float64)
        names: list[str] = []
        for name, module in family.network.named_modules():
            if not list(module.children()):
                module.register_forward_hook(partial(note_backward, name, names))
        loss_of(family.network).backward()
        reached[targets] = {name.split(".")[0] for name in names}
    assert {"down_blocks", "mid_block", "up_blocks"} <= reached[None]
    assert reached["up"] == {"up_blocks", "conv_norm_out", "conv_act", "conv_out"}
