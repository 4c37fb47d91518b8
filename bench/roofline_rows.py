"""A phase against the machine's ceilings: which of them bounds it, and how near it comes."""

from dataclasses import dataclass

import torch

from bench.machine import copy_bandwidth
from bench.rows import Row
from bench.step_costs import product_speed
from bench.traffic import Traffic

# Square products that are tried; the fastest is the ceiling.
PRODUCT_SIZES = {"cpu": (512, 1024), "cuda": (4096, 8192, 16384)}
PRODUCTS, MEMORY = "products", "memory"


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at most, measured.

    Attributes:
        tflop_per_s: Of the fastest square product, in the dtype of the network.
        product_size: Its side.
        gb_per_s: Of a large copy, bytes read and written both counted.
    """

    tflop_per_s: float
    product_size: int
    gb_per_s: float

    def row(self) -> Row:
        """Return them, and the operations a byte from which on products bound."""
        return {
            "product tflop/s": self.tflop_per_s,
            "product size": self.product_size,
            "copy gb/s": self.gb_per_s,
            "ridge flop/byte": 1e3 * self.tflop_per_s / self.gb_per_s,
        }


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    speeds = {size: product_speed(device, dtype, size) for size in PRODUCT_SIZES[device]}
    best = max(speeds, key=lambda size: speeds[size])
    return Ceilings(speeds[best], best, copy_bandwidth(device))


def describe_phase(
    phase: str,
    seconds: float | None,
    flops: int,
    traffic: Traffic,
    ceilings: Ceilings,
    note: str = "",
    floor: float | None = None,
) -> Row:
    """Return a row of the report.

    floor = max(flops / product speed, least bytes / copy bandwidth)
    mfu = flops / seconds / product speed,   share of roof = floor / seconds

    Source: Roofline (Williams, Waterman and Patterson, CACM 52(4), 2009); model FLOPs utilisation
    of PaLM (arXiv 2204.02311), of counted operations and the measured speed of a product. What is
    computed twice counts twice, unlike there: the scores in fused attention's backward pass.

    Args:
        phase: Its name.
        seconds: Median; None where it was not measured.
        flops: Of its products, convolutions and attentions.
        traffic: Bytes, op by op, and the least.
        ceilings: Of the same run.
        note: What a reader must know beside it.
        floor: Of a phase of several parts the sum of their floors; None computes it.
    """
    by_products = flops / ceilings.tflop_per_s / 1e12
    by_memory = traffic.least / ceilings.gb_per_s / 1e9
    bound = PRODUCTS if by_products >= by_memory else MEMORY
    floor = max(by_products, by_memory) if floor is None else floor
    row: Row = {"phase": phase, "p50 s": seconds, "flops": flops, "bytes": traffic.ops}
    row |= {"least bytes": traffic.least, "floor s": floor}
    row |= {"bound": bound, "note": note}
    row["flop/byte"] = flops / traffic.least if traffic.least else None
    rates: Row = dict.fromkeys(("tflop/s", "gb/s", "mfu", "share of copy", "share of roof"))
    if seconds is not None:
        rates["tflop/s"] = flops / seconds / 1e12
        rates["gb/s"] = traffic.ops / seconds / 1e9
        rates["mfu"] = by_products / seconds
        rates["share of copy"] = traffic.ops / ceilings.gb_per_s / 1e9 / seconds
        rates["share of roof"] = floor / seconds
    return row | rates


def print_phases(phases: list[Row]) -> None:
    """Print a line for each phase."""
    for row in phases:
        seconds = "not measured" if row["p50 s"] is None else f"{1e3 * row['p50 s']:.2f} ms"
        line = f"  {row['phase']:<15} {seconds:>14}  {row['flops'] / 1e12:9.5f} TFLOP  "
        line += f"{row['bytes'] / 1e9:8.3f} GB op by op, {row['least bytes'] / 1e9:8.3f} at least"
        if row["mfu"] is not None:
            line += f"; mfu {row['mfu']:.1%}, {row['share of roof']:.1%} of the roof"
            line += f" ({row['bound']})"
        print(line)
