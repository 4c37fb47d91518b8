"""8-bit moments, random rounding and anchors that stream: on a GPU, or in the interpreter."""

import math
from dataclasses import replace

import pytest
import torch

from fastppt_kernels import AnchoredAdamW
from fastppt_kernels.anchored_adamw import anchored_adamw_, eight_bit, op, rounding, staging
from fastppt_kernels.anchored_adamw.reference import anchored_adamw_reference
from fastppt_kernels.testing import (
    HAS_GPU,
    INTERPRETED,
    check_stored,
    draw_tensors,
    load_mutant,
    run_in_interpreter,
)
from tests.kernels.guarded_moments import BLOCK, make_batch, plain_moments, written_of

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]
slow = pytest.mark.slow
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(
    params=[pytest.param("cpu", marks=needs_interpreter), pytest.param("cuda", marks=needs_gpu)]
)
def device(request):
    return request.param


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_the_kernels_pass_in_the_interpreter():
    run_in_interpreter(__file__, "not gpu and not slow")


@slow
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_the_kernels_pass_the_slow_tests_in_the_interpreter():
    run_in_interpreter(__file__, "not gpu and slow")


def check_codes(moments, wanted):
    """Compare codes and scales with those of the reference's moments: a tie may fall elsewhere."""
    maps = eight_bit.make_maps(moments.codes[0][0].device)
    for codes, scales, exacts, each in zip(
        moments.codes, moments.scales, (wanted.exp_avgs, wanted.exp_avg_sqs), maps, strict=True
    ):
        for code, scale, exact in zip(codes, scales, exacts, strict=True):
            exact_code, exact_scale = eight_bit.quantize(exact.float(), each.bounds)
            torch.testing.assert_close(scale, exact_scale, rtol=1e-5, atol=0)
            difference = (code.int() - exact_code.int()).abs()
            assert difference.max() <= 1 and (difference > 0).sum() <= 1 + 0.002 * len(code)


def check_step(device, skip=False, others=(), **options):
    """Take a step; compare all that it writes with the float64 reference."""
    made = [make_batch(device, **options), *(make_batch(device, seed=7, **o) for o in others)]
    batches = [batch for batch, *_ in made]
    assert op._fit_kernels(batches)
    decoded = [
        replace(batch, exp_avgs=moments.decode()[0], exp_avg_sqs=moments.decode()[1])
        for batch, _, moments in made
    ]
    wanted, wanted_penalty, wanted_norm = anchored_adamw_reference(decoded, 1.0)
    starts = [[t.clone() for t in written_of(batch)] for batch in batches]
    flag = torch.tensor(skip, device=device)
    penalty, norm, _ = anchored_adamw_(batches, 1.0, skip=flag, skip_non_finite=True)
    torch.testing.assert_close(penalty.double().cpu(), wanted_penalty.cpu(), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.double().cpu(), wanted_norm.cpu(), rtol=1e-6, atol=0)
    for (batch, guarded, moments), want, start in zip(made, wanted, starts, strict=True):
        guarded.check()
        moments.check()
        if skip:
            assert all(map(torch.equal, written_of(batch), start))
            continue
        check_stored(batch.params, start[: len(batch.params)], want.params)
        check_codes(moments, want)
        for copy, source in zip(batch.copies, want.params, strict=True):
            if copy is not None:
                check_stored([copy], [source], [source])


@pytest.mark.parametrize(
    "form", ["raw", *(pytest.param(f, marks=slow) for f in ("decoupled", "none"))]
)
@pytest.mark.parametrize("dtype", [pytest.param(F32, marks=slow), BF16])
def test_a_step_with_8_bit_moments_equals_the_reference(device, form, dtype):
    check_step(device, form=form, dtype=dtype)


@pytest.mark.parametrize(
    "size", [257, *(pytest.param(n, marks=slow) for n in (1, 255, BLOCK, 2 * BLOCK + 1))]
)
def test_a_step_over_a_flat_parameter_equals_the_reference(device, size):
    check_step(device, sizes=[size], copy_dtype=BF16)


def test_groups_and_the_flag_work_with_8_bit_moments(device):
    other = {"sizes": [63, 100], "form": "decoupled", "lr": 3e-3, "eps": 1e-3}
    check_step(device, sizes=[7, 300], others=[other])
    check_step(device, sizes=[7, 300], skip=True)


FAULTS = {
    "scale of another block": ("scale_ptr + blocks, mask", "scale_ptr + 0 * blocks, mask"),
    "largest of all": ("tl.abs(moment), 0.0), axis=1)", "moment, 0.0), axis=1)"),
    "one code too low": ("half, 0)\n", "half, 0)\n    codes = tl.maximum(codes - 1, 0)\n"),
    "mask missing at the end": ("mask = offsets < count\n", "mask = offsets < count + 5\n"),
    "maps mixed up": ("bound_ptr += 2 * QUANTIZED", "bound_ptr += 0"),
    "flag not read": ("if moves:", "if True:"),
}


@slow
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_turns_the_8_bit_step_red(device, monkeypatch, tmp_path, fault):
    from fastppt_kernels.anchored_adamw import triton_eight_bit_kernel

    skip = fault[0] == "if moves:"
    check_step(device, sizes=[300], skip=skip)
    mutant = load_mutant(triton_eight_bit_kernel.__file__, [fault], tmp_path)
    monkeypatch.setattr("fastppt_kernels.anchored_adamw.triton_eight_bit_kernel", mutant)
    with pytest.raises(AssertionError):
        check_step(device, sizes=[300], skip=skip)


# Rounding up or down at random.

ROUNDING_PROBE = """
import triton
import triton.language as tl

from fastppt_kernels.anchored_adamw.triton_rounding import make_key, round_at_random


@triton.jit
def probe_kernel(value_ptr, out_ptr, step_ptr, seed, counter, count, code, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    value = tl.load(value_ptr + offsets, mask=offsets < count, other=0.0)
    key = make_key(seed, tl.load(step_ptr))
    rounded = round_at_random(value, counter + offsets, key, code)
    tl.store(out_ptr + offsets, rounded, mask=offsets < count)
"""


@pytest.mark.parametrize(("dtype", "code"), [(BF16, 1), (F16, 2)])
def test_the_kernels_round_as_plain_pytorch_does_to_the_bit(device, tmp_path, dtype, code):
    file = tmp_path / "probe.py"
    file.write_text(ROUNDING_PROBE)
    probe = load_mutant(str(file), [], tmp_path).probe_kernel
    values = draw_tensors([(1000,)], dtype=F32)[0] * 10 ** draw_tensors([(1000,)], seed=1)[0] ** 3
    values[:6] = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 65519.0])
    values = values.float().to(device)
    for seed, step, counter in ((0, 1.0, 0), (2**31 - 1, 1000.0, 2**31 - 500), (5, 7.0, 4096)):
        out = torch.empty_like(values)
        at = torch.tensor(step, device=device)
        probe[(1,)](values, out, at, seed, counter, 1000, code, SIZE=1024)
        bits = rounding.random_bits(rounding.make_key(seed, at), counter, 1000)
        wanted = rounding.round_at_random(values, bits, dtype)
        assert torch.equal(out.to(dtype).view(torch.int16)[3:], wanted.view(torch.int16)[3:])
        torch.testing.assert_close(out.to(dtype)[:3], wanted[:3], equal_nan=True)


@pytest.mark.parametrize("moments", [pytest.param("fp32", marks=slow), "8bit"])
def test_a_kernel_step_rounds_by_the_bits_of_plain_pytorch(device, monkeypatch, moments):
    ends = []
    for plain in (False, True):
        batch, guarded, codes = make_batch(device, dtype=BF16, rounding_seed=3)
        if moments == "fp32":
            batch = plain_moments(batch, guarded, codes)
        if plain:
            monkeypatch.setattr(op, "_fit_kernels", lambda batches: False)
        starts = [p.clone() for p in batch.params]
        anchored_adamw_([batch], 1.0)
        guarded.check()
        ends.append(torch.cat(batch.params))
        moved = [(p != s).double().mean() for p, s in zip(batch.params, starts, strict=True)]
    # Where the float32 values differ in the last digits, a bit may fall between them.
    differ = (ends[0] != ends[1]).double().mean()
    assert differ <= 2e-3 and max(moved) > 0.5
    near = (ends[0].view(torch.int16).int() - ends[1].view(torch.int16).int()).abs().max()
    assert near <= 1


# Anchors in host memory.


def on_host(batch, device):
    anchors = [
        None if a is None else a.cpu().pin_memory() if device == "cuda" else a.clone()
        for a in batch.anchors
    ]
    return replace(batch, anchors=anchors, host_anchors=True)


def run_steps(batches, num_steps=2):
    launcher = op.Launcher()
    grads = [[g.clone() for g in batch.grads] for batch in batches]
    seen = []
    for _ in range(num_steps):
        for batch, values in zip(batches, grads, strict=True):
            for grad, value in zip(batch.grads, values, strict=True):
                grad.copy_(value)
        seen += anchored_adamw_(batches, 1.0, launcher=launcher)
    return [*seen, *(t for batch in batches for t in written_of(batch))]


@pytest.mark.parametrize("num_chunks", [1, *(pytest.param(n, marks=slow) for n in (3, 100))])
@pytest.mark.parametrize("dtype", [pytest.param(F32, marks=slow), BF16])
@pytest.mark.parametrize("form", ["raw", pytest.param("decoupled", marks=slow)])
def test_streamed_anchors_give_the_bits_of_those_on_the_device(
    device, monkeypatch, form, dtype, num_chunks
):
    monkeypatch.setattr(staging, "BUFFER_BYTES", num_chunks * BLOCK * 4)
    ends = []
    for host in (False, True):
        made = [
            plain_moments(*make_batch(device, [3 * BLOCK + 30, 7, BLOCK], dtype, form=form)),
            make_batch(device, [9], dtype, form="none", seed=4)[0],
            make_batch(device, [BLOCK + 1], dtype, form="raw", seed=5)[0],
        ]
        if host:
            made = [on_host(batch, device) for batch in made]
        ends.append(run_steps(made))
    assert all(map(torch.equal, *ends))


def test_buffers_are_no_larger_than_what_is_streamed(device):
    batch = on_host(make_batch(device, [BLOCK + 5, 9])[0], device)
    launcher = op.Launcher()
    anchored_adamw_([batch], launcher=launcher)
    (whole,) = op._plan_of(batch).segments
    assert (whole.first_row, whole.num_rows) == (0, 3)
    # The second parameter has no anchor.
    ((_, num_bytes),) = launcher._streams
    assert num_bytes == -(-(BLOCK + 5) * 4 // 16) * 16
    assert op._plan_of(replace(batch, form="none")) is None


STREAM_FAULTS = {
    "anchors of the segment before": (
        "        for number, segment in enumerate(plan.segments):\n",
        "        for number, segment in enumerate(plan.segments):\n"
        "            if number == 1:\n                segment = segment._replace(pieces=())\n",
    ),
    "wrong place in the buffer": ("torch.arange(rows) * (chunk_size", "torch.arange(rows) * (16"),
    "wrong buffer": ("len(segments) % NUM_BUFFERS))", "0))"),
    "first element": ("[piece.start : piece.start + piece.count]", "[: piece.count]"),
}


@slow
@pytest.mark.parametrize("fault", STREAM_FAULTS.values(), ids=STREAM_FAULTS.keys())
def test_a_planted_fault_turns_the_streamed_step_red(device, monkeypatch, tmp_path, fault):
    check = test_streamed_anchors_give_the_bits_of_those_on_the_device
    mutant = load_mutant(staging.__file__, [fault], tmp_path)
    monkeypatch.setattr(op, "make_plan", mutant.make_plan)
    monkeypatch.setattr("fastppt_kernels.anchored_adamw.launcher.AnchorStream", mutant.AnchorStream)
    with pytest.raises(AssertionError):
        check(device, monkeypatch, "raw", BF16, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_an_anchor_that_is_not_pinned_is_refused_and_copies_are_pinned():
    param = torch.nn.Parameter(torch.ones(5, device="cuda"))
    group = {"params": [param], "anchor": [torch.zeros(5)], "anchor_storage": "host"}
    optimizer = AnchoredAdamW([group], anchor_weight=0.1, anchor_storage="host")
    assert "anchor" not in optimizer.state[param]
    optimizer = AnchoredAdamW([param], anchor_weight=0.1, anchor_storage="host")
    assert optimizer.state[param]["anchor"].is_pinned()
    with pytest.raises(ValueError, match=r"anchor\[0\]: is on cpu, not pinned"):
        AnchoredAdamW([group | {"share_anchor": True}], anchor_weight=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("form", ["raw", "decoupled"])
@pytest.mark.parametrize("moments", ["fp32", "8bit"])
def test_a_captured_step_streams_and_rounds_as_the_eager_one(monkeypatch, form, moments):
    monkeypatch.setattr(staging, "BUFFER_BYTES", 1 << 20)
    size = 5 * (1 << 20) + 77
    start = torch.randn(size, device="cuda", dtype=BF16)
    runs = []
    for storage, captured in (("device", False), ("host", False), ("host", True)):
        param = torch.nn.Parameter(start.clone())
        param.grad = torch.zeros_like(param)
        optimizer = AnchoredAdamW(
            [param],
            lr=1e-3,
            anchor_weight=0.05,
            form=form,
            max_grad_norm=1.0,
            anchor_storage=storage,
            moments=moments,
            rounding="stochastic",
        )

        def step(optimizer=optimizer):
            optimizer.step(skip_non_finite=True)

        replay = capture(param, optimizer, step) if captured else step
        for number in range(6):
            param.grad.copy_(torch.sin(param.detach() * (1 + number)))
            if number == 3:
                param.grad[17] = torch.nan
            replay()
            assert optimizer.skipped == (number == 3)
        state = optimizer.state[param]
        runs.append([param, *(state[name] for name in sorted(state) if name != "anchor")])
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


def capture(param, optimizer, step):
    """Return a replay of a step, with everything as it was before the warm-up."""
    written = [param, *(t for n, t in optimizer.state[param].items() if n != "anchor")]
    kept = [t.detach().clone() for t in written]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        for tensor, value in zip(written, kept, strict=True):
            tensor.copy_(value)
    return graph.replay
