"""What two processes do for test_optimizer_processes.py: each run's drift and numbers, on disk."""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastppt_kernels import AnchoredAdamW

NUM_STEPS = 4
SCALE = 0.7
OPTIONS = {"lr": 1e-2, "anchor_weight": 0.4, "max_grad_norm": 0.3}


class Network(torch.nn.Module):
    """Two linear layers, the first with a LoRA pair.

    The last bias has one element, so that with two processes one holds nothing of it.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(5, 7)
        self.last = torch.nn.Linear(7, 1)
        self.down = torch.nn.Parameter(torch.randn(3, 5))
        self.up = torch.nn.Parameter(torch.randn(7, 3))
        self.double()

    def forward(self, inputs):
        hidden = self.first(inputs) + SCALE * inputs @ self.down.T @ self.up.T
        return self.last(torch.tanh(hidden))


def make_groups(net, form):
    """All parameters in one group; for "effective" the pair in a group of its own."""
    pair = [net.down, net.up]
    linear = [*net.first.parameters(), *net.last.parameters()]
    if form != "effective":
        return [{"params": linear, "form": form}, {"params": pair, "form": form}]
    lora = {"params": pair, "form": form, "lora_pairs": [(net.down, net.up, SCALE)]}
    return [{"params": linear}, lora]


def make_inputs():
    return torch.randn(NUM_STEPS, 4, 5, generator=torch.Generator().manual_seed(1)).double()


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(forward, net, optimizer, inputs, bad_step=None):
    """Take steps; return the penalties and norms, and the drift from the start."""
    seen = []
    for number, each in enumerate(inputs):
        optimizer.zero_grad()
        forward(each).square().mean().backward()
        if number == bad_step:
            getattr(net.up.grad, "_local_tensor", net.up.grad)[0, 0] = torch.inf
        optimizer.step(**({} if bad_step is None else {"skip_non_finite": True}))
        inner = getattr(optimizer, "optimizer", optimizer)
        seen.append((float(inner.penalty), float(inner.grad_norm), float(inner.skipped)))
    starts = dict(Network().named_parameters())
    drift = {n: whole(p) - starts[n].detach() for n, p in net.named_parameters()}
    return {"seen": torch.tensor(seen).double(), "drift": drift}


def run_whole(form, **options):
    """What the processes are to equal: one, with the batch of both."""
    net = Network()
    optimizer = AnchoredAdamW(make_groups(net, form), **OPTIONS)
    return train(net, net, optimizer, make_inputs(), **options)


def run_ddp(part, form):
    net = Network()
    optimizer = AnchoredAdamW(make_groups(net, form), **OPTIONS)
    return train(DistributedDataParallel(net), net, optimizer, part)


def run_started_apart(part, rank, anchor):
    """The optimizer is made before the wrap, which gives both processes the first's values."""
    net = Network()
    with torch.no_grad():
        for param in net.parameters():
            param += rank
    optimizer = AnchoredAdamW(make_groups(net, "raw"), anchor=anchor, **OPTIONS)
    wrapped = DistributedDataParallel(net)
    try:
        return train(wrapped, net, optimizer, part if anchor == "first_step" else part[:1])
    except ValueError as error:
        return {"refused": str(error)}


def shard(net, sizes, names, ignored=()):
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    fully_shard(net, mesh=mesh, ignored_params={*ignored})
    return net


def run_fsdp(part, form, sizes=(2,), names=("shard",), anchor="start", **options):
    net = shard(Network(), sizes, names)
    optimizer = AnchoredAdamW(make_groups(net, form), anchor=anchor, **OPTIONS)
    return train(net, net, optimizer, part, **options)


def run_mixed(part):
    """The pair is not sharded, in the effective form, beside sharded layers in the raw form."""
    net = Network()
    shard(net, (2,), ("shard",), ignored=[net.down, net.up])
    optimizer = AnchoredAdamW(make_groups(net, "effective"), **OPTIONS)

    def average(param):
        dist.all_reduce(param.grad)
        param.grad /= 2

    for param in (net.down, net.up):
        param.register_post_accumulate_grad_hook(average)
    return train(net, net, optimizer, part)


def run_resumed(part):
    net = shard(Network(), (2,), ("shard",))
    optimizer = AnchoredAdamW(make_groups(net, "raw"), **OPTIONS)
    train(net, net, optimizer, part[:2])
    saved = get_optimizer_state_dict(net, optimizer)
    other = AnchoredAdamW(make_groups(net, "raw"), anchor="first_step", **OPTIONS)
    set_optimizer_state_dict(net, other, saved)
    return train(net, net, other, part[2:])


def make_accelerator(shards):
    """Return accelerate's object, with its FSDP2 if asked for.

    On the CPU it would make a DDP in spite of its plugin, so it is told.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    if not shards:
        return Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def prepare(shards, anchor):
    accelerator = make_accelerator(shards)
    net = Network()
    optimizer = AnchoredAdamW(make_groups(net, "raw"), anchor=anchor, **OPTIONS)
    wrapped, optimizer = accelerator.prepare(net, optimizer)
    assert isinstance(wrapped, FSDPModule if shards else DistributedDataParallel)
    return accelerator, wrapped, net, optimizer


def run_accelerate(part, shards, anchor="first_step"):
    _, wrapped, net, optimizer = prepare(shards, anchor)
    try:
        return train(wrapped, net, optimizer, part)
    except ValueError as error:
        return {"refused": str(error)}


def run_accelerate_resumed(part, folder):
    accelerator, wrapped, net, optimizer = prepare(True, "first_step")
    train(wrapped, net, optimizer, part[:2])
    accelerator.save_state(folder)
    accelerator, wrapped, net, optimizer = prepare(True, "first_step")
    accelerator.load_state(folder)
    return train(wrapped, net, optimizer, part[2:])


def run_all(rank: int, folder: str) -> None:
    """Be one of the two processes."""
    torch.set_num_threads(1)
    # accelerate reads these, though the processes have met when it does.
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
    }
    # They meet at a file: a port could be another's by then. Who waits in vain is to fail.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    part = make_inputs()[:, 2 * rank : 2 * rank + 2]
    results = {f"ddp {form}": run_ddp(part, form) for form in ("raw", "decoupled", "effective")}
    results |= {f"apart, {a}": run_started_apart(part, rank, a) for a in ("start", "first_step")}
    results |= {f"fsdp {form}": run_fsdp(part, form) for form in ("raw", "decoupled")}
    results["first step"] = run_fsdp(part, "raw", anchor="first_step")
    results["replicas"] = run_fsdp(part, "raw", (2, 1), ("replicate", "shard"))
    results["skipped"] = run_fsdp(part, "raw", bad_step=1 if rank == 1 else -1)
    results["mixed"] = run_mixed(part)
    results["resumed"] = run_resumed(part)
    results["accelerate, ddp"] = run_accelerate(part, shards=False)
    results["accelerate, fsdp"] = run_accelerate(part, shards=True)
    results["accelerate, start"] = run_accelerate(part, shards=True, anchor="start")
    results["accelerate, resumed"] = run_accelerate_resumed(part, str(Path(folder) / "state"))
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
