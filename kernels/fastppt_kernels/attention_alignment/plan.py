"""How the attention maps' work is cut into programs, by shape and dtype."""

from dataclasses import dataclass

import torch

# Heads that one program sums, at most. The groups' sums are ceil(H / 5) / H of the maps, a fifth
# to a quarter; and SDXL's layers have 128 and 64 programs (an H200 has 132 units). Sums of all
# heads in one program would leave its 32x32 layers, 30 of 36, 16 programs of 20 heads each.
GROUP_HEADS = 5
# Queries that one program of the keys' gradient takes, at most: the partial gradients of a 64x64
# layer of SDXL are then 11 % of its maps.
SPLIT_QUERIES = 640
# Programs that it has at least, as far as there are blocks of queries: an H200's units.
SPLIT_PROGRAMS = 132
SUM_WARPS = 4
SUM_SIZE = 1024
# Strides that are multiples of this let 16 bytes of any dtype be loaded at a time.
ALIGNED_ELEMENTS = 8
MAX_HEAD_DIM = 256
# Head dims of the models that are trained, and others of the field.
HEAD_DIMS = (40, 64, 80, 128, 160)


@dataclass(frozen=True)
class Tiling:
    """Queries of a block, warps of a program, and depth of the pipeline of loads."""

    block_queries: int
    num_warps: int
    num_stages: int


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Return the widths of the two pieces of a head dim, powers of two from 16 on, or (width, 0).

    80 is 64 + 16, 160 is 128 + 32: three eighths less than one power. Up to 64 there is one piece:
    two, as 32 + 16 for 40, take more registers than they save.
    """
    if head_dim <= 64:
        return max(16, 1 << (head_dim - 1).bit_length()), 0
    main = 1 << (head_dim.bit_length() - 1)
    if head_dim == main:
        return main, 0
    rest = max(16, 1 << (head_dim - main - 1).bit_length())
    return (2 * main, 0) if rest == main else (main, rest)


def choose_group_heads(num_heads: int) -> int:
    """Return the heads of a group: as few groups as there can be, of equal size where they can."""
    return -(-num_heads // -(-num_heads // GROUP_HEADS))


def choose_split_queries(num_queries: int, block_queries: int, num_programs: int) -> int:
    """Return the queries of a split, whole blocks of them.

    Args:
        num_queries: Q.
        block_queries: Queries of a block.
        num_programs: Programs a split.
    """
    num_blocks = -(-num_queries // block_queries)
    num_splits = max(-(-num_queries // SPLIT_QUERIES), -(-SPLIT_PROGRAMS // num_programs))
    return -(-num_blocks // num_splits) * block_queries


def logsumexp_keys(dtype: torch.dtype, head_dim: int) -> int:
    """Return the keys that the log sum exp takes at a time."""
    if dtype == torch.float32:
        return 32 if head_dim <= 64 else 16
    return 64 if head_dim <= 80 else 32 if head_dim <= 128 else 16


def choose_keys(
    dtype: torch.dtype, head_dim: int, num_keys: int, given_logsumexp: bool
) -> tuple[int, int]:
    """Return the widths of a tile's two pieces: what leaves the fewest unused and fits.

    A softmax over up to 80 keys has one tile: 77 text tokens take 64 + 16 columns. Otherwise tiles
    of 80 or 64: 154 take 160, 256 take 256, 333 take 384. Head dims over 80 have registers for 32
    or 16 only, and so have products in float32, which tensor cores do not do.
    """
    narrow = dtype != torch.float32
    if narrow and not given_logsumexp and num_keys <= 80 and head_dim <= 128:
        return 64, 16 if num_keys > 64 else 0
    # Two tiles of 64 + 16 for 154 keys: one of 128 + 32 spills on sm80 and sm100.
    if narrow and head_dim <= 80 and -(-num_keys // 80) * 80 < -(-num_keys // 64) * 64:
        return 64, 16
    return logsumexp_keys(dtype, head_dim), 0


def choose_gradient_keys(
    dtype: torch.dtype, head_dim: int, num_keys: int, given_logsumexp: bool
) -> tuple[int, int]:
    """Return the same for the gradient of the queries: of several tiles, all of one piece.

    float16 has narrower tiles for wide heads: its keys are there twice, in bfloat16 too.
    """
    is_half = dtype == torch.float16
    widest = 0 if dtype == torch.float32 else 80 if is_half else 128
    if not given_logsumexp and num_keys <= 80 and head_dim <= widest:
        return 64, 16 if num_keys > 64 else 0
    if is_half and head_dim > 64:
        return (32 if head_dim <= 80 else 16), 0
    return logsumexp_keys(dtype, head_dim), 0


def gradient_keys(dtype: torch.dtype, head_dim: int) -> int:
    """Return the keys of a program of the keys' gradient: fewer than 64, see ``lora_gram_kernel``.

    77 text tokens take 96 columns in 3 programs a head, which has more of them than 64 + 16.
    """
    if dtype == torch.float32:
        return 16 if head_dim > 64 else 32
    return 16 if dtype == torch.float16 and head_dim > 128 else 32


def _float32_tiling(head_dim: int) -> Tiling:
    return Tiling(16, 4 if head_dim <= 64 else 8, 1)


def forward_tiling(dtype: torch.dtype, head_dim: int) -> Tiling:
    """Return the tiling of the logsumexp and of the map sum.

    A warp has 16 rows, here and below: with fewer Triton gives several warps the same rows, for it
    lays out products that depend on each other along their rows.
    """
    return _float32_tiling(head_dim) if dtype == torch.float32 else Tiling(64, 4, 2)


def query_tiling(dtype: torch.dtype, head_dim: int) -> Tiling:
    """Return the tiling of the gradient of the queries."""
    return forward_tiling(dtype, head_dim)


def key_tiling(dtype: torch.dtype, head_dim: int) -> Tiling:
    """Return the tiling of the gradient of the keys, of which a program has 32 at most: two warps.

    Where 64 queries of wide heads spill it takes 32.
    """
    if dtype == torch.float32:
        return Tiling(16, 8 if 64 < head_dim <= 128 else 4, 1)
    widest = 64 if dtype == torch.float16 else 128
    return Tiling(64 if head_dim <= widest else 32, 2, 1)


def name_dims(dtype: torch.dtype, head_dim: int) -> dict[str, int]:
    """Return the constexprs of a head dim."""
    main, rest = split_head_dim(head_dim)
    if dtype == torch.float32 and 64 < head_dim <= 128:
        # One piece: two of float32 products would spill.
        main, rest = 128, 0
    elif dtype != torch.float32 and main == 128 and rest == 0:
        # Two pieces: one of 128 would spill.
        main, rest = 64, 64
    return {"HEAD_DIM": head_dim, "DIM_MAIN": main, "DIM_REST": rest}
