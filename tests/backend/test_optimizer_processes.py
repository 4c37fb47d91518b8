"""AnchoredAdamW in several processes: DDP, and FSDP2's sharded parameters."""

import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastppt_kernels import AnchoredAdamW
from fastppt_kernels.testing import worst_error
from tests.backend.optimizer_processes import OPTIONS, Network, make_inputs, run_all, run_whole

# Seconds, of which the processes take about ten.
LONGEST = 200


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    context = torch.multiprocessing.spawn(run_all, args=(str(folder),), nprocs=2, join=False)
    end = time.monotonic() + LONGEST
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            pytest.fail(f"the processes were not done after {LONGEST} s")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def check_equal(results, name, wanted):
    for result in results:
        got = result[name]
        assert got["drift"].keys() == wanted["drift"].keys()
        assert worst_error([*got["drift"].values()], [*wanted["drift"].values()]) <= 1e-9
        torch.testing.assert_close(got["seen"], wanted["seen"], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["raw", "decoupled", "effective"])
def test_two_ddp_processes_equal_one_with_the_batch_of_both(results, form):
    check_equal(results, f"ddp {form}", run_whole(form))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["raw", "decoupled"])
def test_two_fsdp_processes_equal_ddp(results, form):
    check_equal(results, f"fsdp {form}", results[0][f"ddp {form}"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["first step", "apart, first_step", "replicas", "accelerate, ddp", "accelerate, fsdp"],
)
def test_other_ways_to_two_processes_equal_one(results, name):
    check_equal(results, name, run_whole("raw"))


@pytest.mark.slow
def test_a_part_that_is_not_finite_skips_the_step_of_all_processes(results):
    wanted = run_whole("raw", bad_step=1)
    assert wanted["seen"][:, 2].tolist() == [0, 1, 0, 0]
    for result in results:
        got = result["skipped"]
        assert worst_error([*got["drift"].values()], [*wanted["drift"].values()]) <= 1e-9
        assert torch.equal(got["seen"][:, 2], wanted["seen"][:, 2])


@pytest.mark.slow
def test_a_whole_pair_beside_sharded_layers_equals_one_process(results):
    check_equal(results, "mixed", run_whole("effective"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resumed", "accelerate, resumed"])
def test_a_sharded_state_is_resumed(results, name):
    wanted = run_whole("raw")
    wanted["seen"] = wanted["seen"][2:]
    check_equal(results, name, wanted)


@pytest.mark.slow
def test_anchors_of_the_start_are_refused_where_accelerate_shards_later(results):
    for result in results:
        assert 'anchor="first_step"' in result["accelerate, start"]["refused"]


@pytest.mark.slow
def test_anchors_of_the_start_are_refused_where_ddp_gives_a_process_other_values(results):
    assert "drift" in results[0]["apart, start"]
    assert 'anchor="first_step"' in results[1]["apart, start"]["refused"]


@pytest.fixture
def mesh(tmp_path, request):
    """A mesh of one process, this one."""
    device = getattr(request, "param", "cpu")
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/f", rank=0, world_size=1)
    yield init_device_mesh(device, (1,))
    dist.destroy_process_group()


def train(net, optimizer, dtype):
    for each in make_inputs().to(next(net.parameters()).device, dtype):
        optimizer.zero_grad()
        net(each).float().square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "mesh", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["raw", "decoupled"])
def test_a_sharded_network_trains_as_a_whole_one(mesh, form, dtype):
    nets = [Network().to(mesh.device_type, dtype) for _ in range(2)]
    fully_shard(nets[0], mesh=mesh)
    optimizers = [AnchoredAdamW(net.parameters(), form=form, **OPTIONS) for net in nets]
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, dtype)
    drifts = [
        [
            getattr(p, "_local_tensor", p).detach().double() - start.detach().to(p.device, dtype)
            for p, start in zip(net.parameters(), Network().parameters(), strict=True)
        ]
        for net in nets
    ]
    # Of bfloat16 parameters a value may be rounded to its neighbour.
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert worst_error(*drifts) <= tolerance
    penalties = [optimizer.penalty for optimizer in optimizers]
    assert penalties[1] > 0
    torch.testing.assert_close(*penalties, rtol=tolerance, atol=0)
    state = optimizers[0].state[nets[0].down]
    assert {type(state[name]).__name__ for name in ("exp_avg", "exp_avg_sq", "anchor")} == {
        "DTensor"
    }


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"form": "effective"}, "whole downs and ups"),
        ({"moments": "8bit"}, "blocks"),
        ({"rounding": "stochastic"}, "random bits"),
        ({"anchor_storage": "host"}, "offloading"),
        ({"working_copy": True}, "working_copy; leave it out"),
        ({"anchor": "list"}, "distribute_tensor"),
    ],
)
@pytest.mark.parametrize("shards_first", [True, False])
def test_what_does_not_go_with_shards_is_refused(mesh, options, match, shards_first):
    net = Network().to(torch.bfloat16)
    if not shards_first and "anchor" in options:
        match = "took the place"
    if shards_first:
        fully_shard(net, mesh=mesh)
    group = {"params": [net.down, net.up], "anchor": "first_step"} | options
    wholes = [torch.zeros(p.shape, dtype=torch.bfloat16) for p in group["params"]]
    if "working_copy" in options:
        group["working_copy"] = wholes
    if "anchor" in options:
        group["anchor"] = [whole + 1 for whole in wholes]
    if not shards_first:
        if "form" in options:
            group["lora_pairs"] = [(net.down, net.up, 1.0)]
        optimizer = AnchoredAdamW([group], **OPTIONS)
        fully_shard(net, mesh=mesh)
        optimizer.param_groups[0]["params"] = [net.down, net.up]
        for param in (net.down, net.up):
            param.grad = torch.zeros_like(param)
        with pytest.raises(ValueError, match=match):
            optimizer.step()
    else:
        with pytest.raises(ValueError, match=match):
            AnchoredAdamW([group], **OPTIONS)


def test_flat_parameters_are_refused():
    param = torch.nn.Parameter(torch.zeros(3))
    param._fsdp_flattened = True
    with pytest.raises(ValueError, match="fully_shard"):
        AnchoredAdamW([param])
