"""LoRA's launches and time beside peft's, on the CPU: ``python -m bench.lora_cpu --out DIR``.

The projections of one block of SDXL, those of mini-sdxl, and the whole of mini-sdxl's network.
Launches are dispatched operators; views and allocations, which launch nothing, do not count.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peft
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from bench.interleave import interleave
from bench.lora import LAYER, LORA, MINI_LAYERS, OURS, PEFT, grads_by_name
from bench.machine import copy_bandwidth, describe_machine
from bench.problems import BASELINE_TOLERANCES, refuse_if_wrong
from bench.rows import (
    Row,
    describe_target,
    print_rows,
    print_targets,
    time_workload,
    write_report,
)
from bench.step_costs import count_launches
from bench.suites import list_workload
from bench.ways import Call
from fastppt.config import ModelConfig
from fastppt.families.loading import load_family
from fastppt.mini.sdxl import LATENT_CHANNELS, TEXT_WIDTH_2
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables_config import LoraConfig
from fastppt_kernels.testing import worst_error

MINI, NETWORK_RANK = "mini-sdxl", 4
# The network with neither.
FROZEN = "network alone"
SECONDS = 8.0
# Operators of ours over peft's, at most.
LAUNCH_TARGET = 0.6


@dataclass(frozen=True)
class Network:
    """A mini-sdxl UNet whose adapters are trained.

    Attributes:
        unet: In float32, on the CPU.
        zero_grads: What an optimizer does to the gradients before a pass.
        grads: Returns the gradients, by projection: down, up.
    """

    unet: nn.Module
    zero_grads: Call
    grads: Callable[[], dict[str, tuple[Tensor, Tensor]]]


def build_networks(rank: int = NETWORK_RANK) -> dict[str, Network]:
    """Return our network and peft's, with adapters of the same values, zero nowhere."""
    family = load_family(ModelConfig(path=MINI, device="cpu"))
    theirs = copy.deepcopy(family.network)
    config = LoraConfig(rank=rank)
    adapters = LoraAdapters(family.make_adaptable(), config, seed=0, device=family.device)
    generator = torch.Generator().manual_seed(1)
    for pair in adapters.pairs:
        pair.up.copy_(0.1 * torch.randn(pair.up.shape, generator=generator))
    names = [pair.name for pair in adapters.pairs]
    theirs.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
    leaves: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for pair in adapters.pairs:
        layer = theirs.get_submodule(pair.name)
        leaves[pair.name] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for leaf, value in zip(leaves[pair.name], (pair.down, pair.up), strict=True):
            leaf.data = value.clone()

    def forget() -> None:
        for pair in leaves.values():
            for leaf in pair:
                leaf.grad = None

    return {
        OURS: Network(family.network, adapters.arena.grad.zero_, lambda: grads_by_name(adapters)),
        PEFT: Network(
            theirs, forget, lambda: {name: (a.grad, b.grad) for name, (a, b) in leaves.items()}
        ),
    }


def network_pass(unet: nn.Module, zero_grads: Call, seed: int = 0) -> Call:
    """Return a forward and backward pass from a drawn gradient; a call returns the prediction."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    shape = (1, LATENT_CHANNELS, 16, 16)
    latents, tokens, upstream = draw(shape), draw(1, 24, 128), draw(shape)
    conditions = {"text_embeds": draw(1, TEXT_WIDTH_2), "time_ids": draw(1, 6)}

    def call() -> Tensor:
        zero_grads()
        prediction = unet(latents, 500, tokens, added_cond_kwargs=conditions, return_dict=False)[0]
        prediction.backward(upstream)
        return prediction.detach()

    return call


def frozen_network() -> nn.Module:
    """Return mini-sdxl without adapters, whose backward pass goes as far as theirs does.

    That is to the input of the first attention; so its passes are what no trainer can save.
    """
    unet = load_family(ModelConfig(path=MINI, device="cpu")).network
    first = next(module for module in unet.modules() if isinstance(module, Attention))
    first.register_forward_pre_hook(
        lambda module, given: (given[0].detach().requires_grad_(), *given[1:])
    )
    return unet


def check_networks(networks: dict[str, Network]) -> float:
    """Return by how much prediction or gradients differ; raise DisagreementError if by too much."""
    predictions = [network_pass(n.unet, n.zero_grads)() for n in networks.values()]
    ours, theirs = (n.grads() for n in networks.values())
    given = [predictions[0], *(grad for name in theirs for grad in ours[name])]
    wanted = [predictions[1], *(grad for pair in theirs.values() for grad in pair)]
    error = worst_error(given, [tensor.double() for tensor in wanted])
    return refuse_if_wrong({"gradients": error}, BASELINE_TOLERANCES)


def count_network_launches(networks: dict[str, Network]) -> dict[str, int]:
    """Return the operators that a pass dispatches, views and allocations not counted."""
    calls = {name: network_pass(n.unet, n.zero_grads) for name, n in networks.items()}
    calls[FROZEN] = network_pass(frozen_network(), lambda: None)
    counted = {}
    for name, call in calls.items():
        call()
        counted[name] = count_launches(call, "cpu").kernels
    return counted


def time_networks(seconds: float) -> list[Row]:
    """Return a row for ours, for peft's, and for the network without adapters."""
    networks = build_networks()
    error = check_networks(networks)
    launches = count_network_launches(networks)
    calls = {name: network_pass(n.unet, n.zero_grads) for name, n in networks.items()}
    calls[FROZEN] = network_pass(frozen_network(), lambda: None)
    timings = interleave(calls, seconds=seconds)
    return [
        {"suite": "lora in a network", "workload": MINI, "way": name, "rank": NETWORK_RANK}
        | {"p20 ms": timing.p20, "p50 ms": timing.p50, "p80 ms": timing.p80}
        | {"rounds": len(timing.rounds), "times ours": timing.times(timings[OURS])}
        | {"launches": launches[name], "error": None if name == FROZEN else error}
        for name, timing in timings.items()
    ]


def count_layer_launches(name: str) -> dict[str, int]:
    """Return the operators that a call of each way dispatches on the CPU, by way."""
    problem = LORA.make_problem(list_workload(name).shapes)
    calls = {way: LORA.makers[way](problem).call for way in LORA.ways(compiled=False)}
    return {way: count_launches(call, "cpu").kernels for way, call in calls.items()}


def list_targets(rows: Sequence[Row]) -> list[Row]:
    """Return what is asked of the launches, beside what was counted."""
    counted = {(row["workload"], row["way"]): row["launches"] for row in rows}
    layers = counted[MINI_LAYERS, OURS] / counted[MINI_LAYERS, PEFT]
    frozen = counted[MINI, FROZEN]
    added = (counted[MINI, OURS] - frozen) / (counted[MINI, PEFT] - frozen)
    what = "mini-sdxl, forward and backward, operators over peft's, at most: "
    return [
        describe_target(f"{what}adapted projections", LAUNCH_TARGET, layers, at_most=True),
        describe_target(f"{what}what adapters add", LAUNCH_TARGET, added, at_most=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lora", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON")
    out = parser.parse_args().out
    # More OpenMP threads than free cores make this many times slower.
    torch.set_num_threads(1)
    machine, copy_gb_per_s = describe_machine("cpu"), copy_bandwidth("cpu")
    rows, refusals = [], []
    for name in (LAYER, MINI_LAYERS):
        print(name)
        timed, refused = time_workload(
            LORA,
            list_workload(name),
            names=LORA.ways(compiled=False),
            copy_gb_per_s=copy_gb_per_s,
            seconds=SECONDS,
        )
        print_rows(timed)
        launches = count_layer_launches(name)
        rows += [row | {"launches": launches[row["way"]]} for row in timed]
        refusals += refused
    networks = time_networks(SECONDS)
    for row in networks:
        print(f"  {row['way']:<48} {row['p50 ms']:9.3f} ms  x{row['times ours']:.2f}")
    rows += networks
    for row in rows:
        print(f"  {row['workload']}, {row['way']}: {row['launches']} operators")
    targets = list_targets(rows)
    print_targets(targets)
    report = {"machine": machine, "copy gb/s": copy_gb_per_s, "targets": targets}
    path = out / f"cpu-lora-{machine['date']}.json"
    write_report(path, report | {"rows": rows, "refused": refusals})
    print(f"written: {path}")
    for row in refusals:
        raise SystemExit(f"{row['workload']}, {row['way']}: {row['refused']}")


if __name__ == "__main__":
    main()
