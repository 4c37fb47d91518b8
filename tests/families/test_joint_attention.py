"""Our joint attention is the stock one with adapters off, and peft's LoRA with them on."""

from __future__ import annotations

import peft
import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from fastppt.families.backends import resolve_attention
from fastppt.families.joint_attention import make_joint_adaptable
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables_config import LoraConfig

# Blocks as SD3 has them, as SD3.5 large has them, and as SD3.5 medium has them.
KINDS = {
    "plain": {},
    "normalised": {"qk_norm": "rms_norm"},
    "dual": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 2)},
}
LAST_QUERY = "transformer_blocks.2.attn.add_q_proj"


def build_network(kind: str, dtype: torch.dtype) -> SD3Transformer2DModel:
    """A network of three blocks whose norms are not all the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            num_attention_heads=3,
            attention_head_dim=8,
            joint_attention_dim=20,
            caption_projection_dim=24,
            pooled_projection_dim=12,
            pos_embed_max_size=8,
            **KINDS[kind],
        )
        for name, weight in network.named_parameters():
            if ".norm_" in name:
                torch.nn.init.uniform_(weight, 0.5, 2.0)
    return network.eval().requires_grad_(False).to(dtype)


def adapt(network: SD3Transformer2DModel, config: LoraConfig, dtype: torch.dtype) -> LoraAdapters:
    """Adapters with values that are not zero anywhere."""
    device = torch.device("cpu")
    processors = make_joint_adaptable(network, resolve_attention("sdpa", device, dtype))
    groups = [group for processor in processors for group in processor.groups]
    adapters = LoraAdapters(groups, config, seed=0, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    for pair in adapters.pairs:
        pair.up.copy_(torch.randn(pair.up.shape, generator=generator))
    return adapters


def predict(network: SD3Transformer2DModel, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    # 15 image tokens and 7 text tokens.
    return network(draw(2, 4, 6, 10), draw(2, 7, 20), draw(2, 12), torch.tensor([5.0, 900])).sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_base_pass_equals_the_stock_processor_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    network = build_network(kind, dtype)
    with torch.no_grad():
        stock = predict(network, dtype)
        adapters = adapt(network, LoraConfig(rank=2), dtype)
        tuned = predict(network, dtype)
        with adapters.switch.base():
            assert torch.equal(predict(network, dtype), stock)
        assert not torch.equal(tuned, stock)
        assert torch.equal(predict(network, dtype), tuned)


@pytest.mark.parametrize("pre_only", [False, True])
def test_each_block_equals_the_stock_block_at_odd_sizes(pre_only: bool) -> None:
    network = build_network("dual", torch.float32)
    block = network.transformer_blocks[2 if pre_only else 0]
    generator = torch.Generator().manual_seed(1)
    for num_image_tokens, num_text_tokens in ((1, 1), (63, 7), (300, 50)):
        image = torch.randn(2, num_image_tokens, 24, generator=generator)
        text = torch.randn(2, num_text_tokens, 24, generator=generator)
        time = torch.randn(2, 24, generator=generator)
        with torch.no_grad():
            stock = build_network("dual", torch.float32).transformer_blocks[2 if pre_only else 0]
            wanted = stock(image, text, time)
            make_joint_adaptable(network, resolve_attention("sdpa", image.device, image.dtype))
            text_after, image_after = block(image, text, time)
        assert torch.equal(image_after, wanted[1])
        if pre_only:
            assert text_after is None
            assert wanted[0] is None
        else:
            assert torch.equal(text_after, wanted[0])


def test_base_pass_does_no_adapter_work() -> None:
    network = build_network("dual", torch.float32)
    adapters = adapt(network, LoraConfig(rank=2), torch.float32)
    for pair in adapters.pairs:
        pair.up.fill_(float("nan"))
    with torch.no_grad(), adapters.switch.base():
        assert predict(network, torch.float32).isfinite().all()


def test_projections_share_their_input_and_come_in_the_order_of_the_modules() -> None:
    network = build_network("dual", torch.float32)
    processors = make_joint_adaptable(
        network, resolve_attention("sdpa", torch.device("cpu"), torch.float32)
    )
    parts = [[group.names for group in processor.groups] for processor in processors]
    first = "transformer_blocks.0.attn"
    assert parts[0] == [
        (f"{first}.to_q", f"{first}.to_k", f"{first}.to_v"),
        (f"{first}.add_k_proj", f"{first}.add_v_proj", f"{first}.add_q_proj"),
        (f"{first}.to_out.0",),
        (f"{first}.to_add_out",),
    ]
    second = "transformer_blocks.0.attn2"
    image_alone = (f"{second}.to_q", f"{second}.to_k", f"{second}.to_v"), (f"{second}.to_out.0",)
    assert parts[1] == list(image_alone)
    names = [name for groups in parts for group in groups for name in group]
    linears = [
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and ".attn" in name and name != LAST_QUERY
    ]
    assert names == linears


def test_medium_size_has_380_adapter_tensors() -> None:
    # stabilityai/stable-diffusion-3-medium-diffusers, transformer/config.json
    with torch.device("meta"):
        network = SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            out_channels=16,
            pos_embed_max_size=192,
        )
    processors = make_joint_adaptable(
        network, resolve_attention("sdpa", torch.device("meta"), torch.float32)
    )
    names = [name for processor in processors for group in processor.groups for name in group.names]
    assert len(set(names)) == len(names) == 24 * 8 - 2
    assert 2 * len(names) == 380
    last = {name.rpartition("23.attn.")[2] for name in names if ".23." in name}
    assert last == {"to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "to_out.0"}


def loss_of(network: torch.nn.Module) -> Tensor:
    prediction = predict(network, torch.float64)
    generator = torch.Generator().manual_seed(2)
    return (prediction * torch.randn(prediction.shape, generator=generator)).sum()


def peft_network(kind: str, adapters: LoraAdapters) -> torch.nn.Module:
    """The stock network under peft's LoRA of the same values, and one on the unread query."""
    network = build_network(kind, torch.float64)
    names = [pair.name for pair in adapters.pairs]
    config = peft.LoraConfig(
        r=adapters.rank, lora_alpha=adapters.alpha, target_modules=[*names, LAST_QUERY]
    )
    network.add_adapter(config)
    modules = dict(network.named_modules())
    for pair in adapters.pairs:
        modules[pair.name].lora_A["default"].weight.data = pair.down.clone()
        modules[pair.name].lora_B["default"].weight.data = pair.up.clone()
    torch.nn.init.ones_(modules[LAST_QUERY].lora_B["default"].weight)
    return network


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rank", "alpha", "targets"),
    [
        (3, 7.0, None),
        (2, None, ["*.add_q_proj", "*.to_k"]),
        (2, 1.0, ["*.add_v_proj", "*.to_add_out"]),
    ],
)
def test_forward_and_gradients_equal_those_of_peft(
    kind: str, rank: int, alpha: float | None, targets: list[str] | None
) -> None:
    network = build_network(kind, torch.float64)
    config = LoraConfig(rank=rank, alpha=alpha, targets=targets)
    adapters = adapt(network, config, torch.float64)
    theirs = peft_network(kind, adapters)
    our_loss, their_loss = loss_of(network), loss_of(theirs)
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-9, atol=0)
    our_loss.backward()
    their_loss.backward()
    modules = dict(theirs.named_modules())
    for pair in adapters.pairs:
        layer = modules[pair.name]
        for view, parameter in (
            (pair.down, layer.lora_A["default"].weight),
            (pair.up, layer.lora_B["default"].weight),
        ):
            start = view.storage_offset()
            ours = adapters.arena.grad[start : start + view.numel()].view(view.shape)
            assert ours.abs().max() > 0, pair.name
            scale = parameter.grad.abs().max()
            assert (ours - parameter.grad).abs().max() <= 1e-9 * scale, pair.name
    # Why it has no place for an adapter: whatever its values, nothing changes.
    unread = modules[LAST_QUERY]
    for part in (unread.lora_A, unread.lora_B):
        assert part["default"].weight.grad.abs().max() == 0
