"""The shapes of what real trainings move, computed from the architectures: needs no diffusers.

A list of adapters holds, for each adapted projection, a down [rank, in] and an up [out, rank].
"""

from collections.abc import Iterator
from math import prod

Shape = tuple[int, ...]

# Transformer blocks of each width, each with a self- and a cross-attention of four projections.
SDXL_BLOCKS = {640: 10, 1280: 60}
SDXL_CONTEXT = 2048
SD15_BLOCKS = {320: 5, 640: 5, 1280: 6}
SD15_CONTEXT = 768

SD3_BLOCKS = 24
SD3_WIDTH = 1536
# q, k, v and out of the image stream and of the text stream.
SD3_PROJECTIONS = 8
# The last block gives out no text: it has no to_add_out, and its add_q_proj gets no gradient.
SD3_LAST_PROJECTIONS = 6

# The layers whose features are aligned: [1, C, H, W] of a UNet, image tokens [1, N, C] of SD3.
FEATURES: dict[str, list[Shape]] = {
    "SDXL features": [(1, 1280, 32, 32)] * 3 + [(1, 640, 64, 64)] * 3,
    "SD1.5 features": [(1, 640, 32, 32)] * 3 + [(1, 320, 64, 64)] * 3,
    "SD3-M features": [(1, 4096, SD3_WIDTH)] * (SD3_BLOCKS // 2),
}


def _queries_and_keys(
    num_layers: int, num_heads: int, num_queries: int, num_keys: int, head_dim: int
) -> list[Shape]:
    """The image query and the text key of each layer."""
    pair = [(1, num_heads, num_queries, head_dim), (1, num_heads, num_keys, head_dim)]
    return pair * num_layers


# The attentions whose maps are aligned, at 1024 px, and at 512 px for SD1.5.
ATTENTIONS: dict[str, list[Shape]] = {
    "SDXL attention": _queries_and_keys(30, 20, 1024, 77, 64)
    + _queries_and_keys(6, 10, 4096, 77, 64),
    "SD1.5 attention": _queries_and_keys(3, 8, 1024, 77, 80)
    + _queries_and_keys(3, 8, 4096, 77, 40),
    "SD3-M attention, 154 text tokens": _queries_and_keys(SD3_BLOCKS // 2, 24, 4096, 154, 64),
    "SD3-M attention, 333 text tokens": _queries_and_keys(SD3_BLOCKS // 2, 24, 4096, 333, 64),
    "SDXL attention, a layer of each": _queries_and_keys(1, 20, 1024, 77, 64)
    + _queries_and_keys(1, 10, 4096, 77, 64),
    "SD3-M attention, 154 text tokens, a layer": _queries_and_keys(1, 24, 4096, 154, 64),
    "SD3-M attention, 333 text tokens, a layer": _queries_and_keys(1, 24, 4096, 333, 64),
    "SD3-M attention at 512 px, 154 text tokens, a layer": _queries_and_keys(1, 24, 1024, 154, 64),
}


def _projections(rows: int, inputs: int, outputs: int, count: int, rank: int) -> list[Shape]:
    """Inputs, weights, downs, ups and outputs of linears that share an input."""
    return [
        (rows, inputs),
        (count, outputs, inputs),
        (count * rank, inputs),
        (count, outputs, rank),
        (count, rows, outputs),
    ]


def _block(rows: int, width: int, text: tuple[int, int], rank: int) -> list[Shape]:
    """A transformer block: self-attention, then cross-attention to text of so many tokens."""
    out = _projections(rows, width, width, 1, rank)
    self_attention = [*_projections(rows, width, width, 3, rank), *out]
    keys_and_values = _projections(text[0], text[1], width, 2, rank)
    return [*self_attention, *_projections(rows, width, width, 1, rank), *keys_and_values, *out]


SDXL_TEXT, MINI_TEXT = (77, SDXL_CONTEXT), (24, 128)
# The adapted projections, at rank 32 and 1024 px; of mini-sdxl at rank 4.
PROJECTIONS: dict[str, list[Shape]] = {
    "SDXL projections": _block(1024, 1280, SDXL_TEXT, 32) * SDXL_BLOCKS[1280]
    + _block(4096, 640, SDXL_TEXT, 32) * SDXL_BLOCKS[640],
    "SDXL projections, a block": _block(1024, 1280, SDXL_TEXT, 32),
    "mini-sdxl projections": _block(256, 48, MINI_TEXT, 4) * 3
    + _block(64, 64, MINI_TEXT, 4) * 6
    + _block(16, 96, MINI_TEXT, 4),
}
# A prediction: at 1024 px, and at 512 px for SD1.5.
LATENTS: dict[str, list[Shape]] = {
    "SDXL latents": [(1, 4, 128, 128)],
    "SD1.5 latents, batch 4": [(4, 4, 64, 64)],
    "SD3-M latents": [(1, 16, 128, 128)],
}

SD15_WIDTHS = (320, 640, 1280, 1280)
SD15_TIME = 1280
SD15_LATENT = 4
# A tensor of the scaling lists: an up of SDXL's narrower blocks at rank 4.
SCALING_SHAPE = (640, 4)
SCALING_COUNTS = (10, 100, 1_000, 10_000)


def count_elements(shapes: list[Shape]) -> int:
    return sum(map(prod, shapes))


def list_sdxl_adapters(rank: int) -> list[Shape]:
    """SDXL's 560 attention projections."""
    return _list_unet_adapters(SDXL_BLOCKS, SDXL_CONTEXT, rank)


def list_sd15_adapters(rank: int) -> list[Shape]:
    """SD1.5's 128 attention projections."""
    return _list_unet_adapters(SD15_BLOCKS, SD15_CONTEXT, rank)


def list_sd3_adapters(rank: int) -> list[Shape]:
    """SD3-M's 190 attention projections that get a gradient."""
    num_pairs = (SD3_BLOCKS - 1) * SD3_PROJECTIONS + SD3_LAST_PROJECTIONS
    return [(rank, SD3_WIDTH), (SD3_WIDTH, rank)] * num_pairs


def list_scaling(num_tensors: int) -> list[Shape]:
    """Equal tensors, as many as asked for."""
    return [SCALING_SHAPE] * num_tensors


def list_sd15_unet() -> list[Shape]:
    """All parameters of SD1.5's UNet, which a full fine-tune moves."""
    first, *_, last = SD15_WIDTHS
    shapes = [
        *_conv(SD15_LATENT, first),
        *_linear(first, SD15_TIME),
        *_linear(SD15_TIME, SD15_TIME),
    ]
    skips, width = [first], first
    for level, level_width in enumerate(SD15_WIDTHS):
        for _ in range(2):
            shapes += [*_resnet(width, level_width), *_transformer_if(level, level_width)]
            width = level_width
            skips.append(width)
        if level < len(SD15_WIDTHS) - 1:
            shapes += _conv(width, width)
            skips.append(width)
    shapes += [*_resnet(last, last), *_transformer(last), *_resnet(last, last)]
    for level, level_width in reversed(list(enumerate(SD15_WIDTHS))):
        for _ in range(3):
            shapes += [*_resnet(width + skips.pop(), level_width)]
            shapes += _transformer_if(level, level_width)
            width = level_width
        if level > 0:
            shapes += _conv(width, width)
    return [*shapes, *_norm(width), *_conv(width, SD15_LATENT)]


def _list_unet_adapters(blocks: dict[int, int], context: int, rank: int) -> list[Shape]:
    shapes: list[Shape] = []
    for width, num_blocks in blocks.items():
        # q, k, v, out of the self-attention, then of the cross-attention.
        for in_width in [width, width, width, width, width, context, context, width] * num_blocks:
            shapes += [(rank, in_width), (width, rank)]
    return shapes


def _linear(inputs: int, outputs: int, *, bias: bool = True) -> list[Shape]:
    return [(outputs, inputs), (outputs,)] if bias else [(outputs, inputs)]


def _conv(inputs: int, outputs: int, size: int = 3) -> list[Shape]:
    return [(outputs, inputs, size, size), (outputs,)]


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


def _resnet(inputs: int, outputs: int) -> Iterator[Shape]:
    yield from [*_norm(inputs), *_conv(inputs, outputs), *_linear(SD15_TIME, outputs)]
    yield from [*_norm(outputs), *_conv(outputs, outputs)]
    if inputs != outputs:
        yield from _conv(inputs, outputs, size=1)


def _attention(width: int, context: int) -> list[Shape]:
    keys = [*_linear(context, width, bias=False), *_linear(context, width, bias=False)]
    return [*_linear(width, width, bias=False), *keys, *_linear(width, width)]


def _transformer(width: int) -> Iterator[Shape]:
    yield from [*_norm(width), *_conv(width, width, size=1)]
    yield from [*_norm(width), *_attention(width, width)]
    yield from [*_norm(width), *_attention(width, SD15_CONTEXT)]
    # GEGLU: eight widths in, of which half gate the other half.
    yield from [*_norm(width), *_linear(width, 8 * width), *_linear(4 * width, width)]
    yield from _conv(width, width, size=1)


def _transformer_if(level: int, width: int) -> list[Shape]:
    """A transformer at every level but the deepest."""
    return list(_transformer(width)) if level < len(SD15_WIDTHS) - 1 else []
