"""The kernels of the step: on a GPU, or in Triton's interpreter, in a process of its own."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastppt_kernels import AnchoredAdamW
from fastppt_kernels.anchored_adamw import Batch, anchored_adamw_, op
from fastppt_kernels.anchored_adamw.reference import anchored_adamw_reference
from fastppt_kernels.testing import (
    HAS_GPU,
    INTERPRETED,
    GuardedTensors,
    check_stored,
    draw_tensors,
    load_mutant,
    overall_error,
    run_in_interpreter,
)

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")

BLOCK = op.CHUNK_SIZE
SIZES = [1, 7, 63, 1000, BLOCK + 17]
FORMS = ["raw", "decoupled", "none"]
F32, BF16 = torch.float32, torch.bfloat16
# Param, anchor, gradient, working copy.
DTYPES = {
    "float32": (F32, F32, F32, None),
    "float32 with a copy": (F32, F32, F32, BF16),
    "bfloat16 gradient": (F32, F32, BF16, BF16),
    "bfloat16 anchor": (F32, BF16, F32, None),
    "bfloat16": (BF16, BF16, BF16, None),
}


@pytest.fixture(
    params=[pytest.param("cpu", marks=needs_interpreter), pytest.param("cuda", marks=needs_gpu)]
)
def device(request):
    return request.param


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_the_kernels_pass_in_the_interpreter():
    run_in_interpreter(__file__, "not gpu and not slow")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_the_kernels_pass_the_slow_tests_in_the_interpreter():
    run_in_interpreter(__file__, "not gpu and slow")


def make_batch(device, sizes=SIZES, dtypes="float32", form="raw", seed=0, shift=0, **options):
    guarded = GuardedTensors(device, seed)
    param, anchor, grad, copy = DTYPES[dtypes]

    def tensors(dtype):
        return [guarded.draw(size, dtype, shift) for size in sizes]

    anchors = tensors(anchor)
    options = {
        "lr": 1e-2,
        "anchor_weight": 0.3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.1,
    } | options
    batch = Batch(
        params=tensors(param),
        grads=tensors(grad),
        # The second has an anchor of zeros.
        anchors=[a if i != 1 else None for i, a in enumerate(anchors)],
        exp_avgs=tensors(F32),
        exp_avg_sqs=[t.square_() for t in tensors(F32)],
        steps=[torch.tensor(float(i), device=device) for i in range(len(sizes))],
        copies=[None if copy is None or i == 2 else t for i, t in enumerate(tensors(copy or F32))],
        form=form,
        **options,
    )
    return batch, guarded


def tensors_of(batch):
    """What a step writes, and may."""
    copies = [c for c in batch.copies if c is not None]
    return [*batch.params, *batch.exp_avgs, *batch.exp_avg_sqs, *batch.steps, *copies]


def check_step(
    device, max_grad_norm=1.0, others=(), skip=None, skip_non_finite=False, bad=None, **options
):
    """Take a step; compare all that it writes with the float64 reference. Updates, not values."""
    made = [make_batch(device, **options), *(make_batch(device, seed=7, **o) for o in others)]
    batches = [batch for batch, _ in made]
    if bad is not None:
        batches[-1].grads[0][3] = bad
    starts = [[t.clone() for t in tensors_of(batch)] for batch in batches]
    wanted, wanted_penalty, wanted_norm = anchored_adamw_reference(batches, max_grad_norm)
    penalty, norm, skipped = anchored_adamw_(
        batches, max_grad_norm, skip=skip, skip_non_finite=skip_non_finite
    )
    torch.testing.assert_close(penalty.double().cpu(), wanted_penalty.cpu(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        norm.double().cpu(), wanted_norm.cpu(), rtol=1e-6, atol=0, equal_nan=True
    )
    assert skipped.dtype == torch.bool and skipped.dim() == 0
    stays = (skip is not None and skip != 0) or (skip_non_finite and not wanted_norm.isfinite())
    assert skipped == stays
    for batch, want, start, (_, guarded) in zip(batches, wanted, starts, made, strict=True):
        guarded.check()
        if stays:
            assert all(map(torch.equal, tensors_of(batch), start))
            continue
        assert torch.equal(torch.stack(batch.steps).cpu(), torch.stack(want.steps).float().cpu())
        given = [*batch.params, *batch.exp_avgs, *batch.exp_avg_sqs]
        expected = [*want.params, *want.exp_avgs, *want.exp_avg_sqs]
        check_stored(given, start[: len(given)], expected)
        for copy, source in zip(batch.copies, want.params, strict=True):
            if copy is not None:
                check_stored([copy], [source], [source])


def test_the_kernels_are_what_runs(device):
    batch, _ = make_batch(device)
    assert op._fit_kernels([batch])
    wide = replace(batch, params=[p.double() for p in batch.params])
    assert not op._fit_kernels([wide])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_a_step_over_foreign_tensors_equals_the_reference(device, form, dtypes):
    check_step(device, form=form, dtypes=dtypes)


@pytest.mark.parametrize("size", [1, 7, 63, 1000, BLOCK, 2 * BLOCK + 1])
def test_a_step_over_a_flat_parameter_equals_the_reference(device, size):
    check_step(device, sizes=[size])


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16 gradient"])
def test_tensors_off_the_alignment_equal_the_reference(device, dtypes):
    check_step(device, shift=1, dtypes=dtypes)


@pytest.mark.parametrize("max_grad_norm", [None, 1e9])
def test_a_step_that_does_not_clip_equals_the_reference(device, max_grad_norm):
    check_step(device, max_grad_norm, sizes=[63, 1000])


def test_groups_have_their_options_and_one_clip(device):
    other = {
        "sizes": [63, 100],
        "form": "decoupled",
        "lr": torch.tensor(3e-3, device=device),
        "anchor_weight": torch.tensor(0.7, device=device),
        "betas": (0.0, 0.5),
        "eps": 1e-3,
        "weight_decay": 0.0,
    }
    check_step(device, sizes=[7, 100], others=[other, {"sizes": [5], "form": "none"}])


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_a_flag_on_the_device_makes_the_step_a_no_op(device, flag, dtype):
    skip = torch.tensor(flag, device=device).to(dtype)
    check_step(device, skip=skip, sizes=[7, 1000], dtypes="float32 with a copy")


def test_a_skipped_step_keeps_nan_gradients_out(device):
    batch, _ = make_batch(device, sizes=[7, 100])
    batch.grads[0][3] = torch.nan
    start = [t.clone() for t in tensors_of(batch)]
    _, norm, skipped = anchored_adamw_([batch], 1.0, skip=torch.tensor(True, device=device))
    assert norm.isnan() and skipped
    assert all(map(torch.equal, tensors_of(batch), start))


SECOND_GROUP = {"sizes": [5, BLOCK + 5], "anchor_weight": 0.7}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("max_grad_norm", [1.0, None])
@pytest.mark.parametrize("form", FORMS)
def test_one_bad_element_of_one_group_stops_them_all(device, form, max_grad_norm, bad):
    check_step(
        device,
        max_grad_norm,
        sizes=[7, 100],
        form=form,
        dtypes="float32 with a copy",
        others=[SECOND_GROUP | {"form": form}],
        skip_non_finite=True,
        bad=bad,
    )


@pytest.mark.parametrize("skip", [None, False, True])
@pytest.mark.parametrize("bad", [None, torch.nan])
def test_a_step_is_skipped_by_its_norm_or_by_the_flag(device, skip, bad):
    flag = None if skip is None else torch.tensor(skip, device=device)
    check_step(device, skip=flag, skip_non_finite=True, bad=bad, sizes=[7, 100])


def test_finite_gradients_whose_squares_overflow_count_as_not_finite(device):
    batch, _ = make_batch(device, sizes=[7, 100])
    batch.grads[0][3] = 1e30
    start = [t.clone() for t in tensors_of(batch)]
    _, norm, skipped = anchored_adamw_([batch], 1.0, skip_non_finite=True)
    assert norm.isinf() and skipped
    assert all(map(torch.equal, tensors_of(batch), start))


def test_a_flag_that_is_neither_0_nor_1_is_told_as_a_bool(device):
    batch, _ = make_batch(device, sizes=[7])
    _, _, skipped = anchored_adamw_([batch], skip=torch.tensor(-3, device=device))
    assert skipped.view(torch.uint8) == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_does_what_clip_grad_norm_does(device, bad):
    batch, _ = make_batch(device, sizes=[7, 100], form="none")
    batch.grads[0][3] = bad
    params = [torch.nn.Parameter(p.clone()) for p in batch.params]
    for param, grad in zip(params, batch.grads, strict=True):
        param.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    wanted = [m + 0.1 * (p.grad - m) for m, p in zip(batch.exp_avgs, params, strict=True)]
    anchored_adamw_([batch], 1.0)
    for one, other in zip(batch.exp_avgs, wanted, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_scratch_memory_holds_nothing_that_is_read(device, monkeypatch):
    empty = torch.empty

    def poisoned(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(torch.nan if made.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
    check_step(device, sizes=[7, BLOCK + 5])


@pytest.mark.parametrize("layout", ["gradient", "parameter", "both"])
def test_strides_do_not_change_a_step(device, layout):
    weights = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0)).to(device)
    channels_last = weights.to(memory_format=torch.channels_last)
    given = torch.nn.Parameter((weights if layout == "gradient" else channels_last).clone())
    given.grad = (weights if layout == "parameter" else channels_last).sin()
    wanted = torch.nn.Parameter(weights.clone())
    wanted.grad = weights.sin()
    for param in (given, wanted):
        AnchoredAdamW([param], lr=1e-2).step()
    assert torch.equal(given, wanted)


def test_a_parameter_without_a_gradient_stays(device):
    params = make_params(device)
    optimizer = make_optimizer(params, "raw")
    starts = [p.detach().clone() for p in params]
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert torch.equal(params[0], starts[0])
    assert optimizer.state[params[0]]["step"] == 0
    assert optimizer.state[params[1]]["step"] == 1
    assert not torch.equal(params[1], starts[1])


def test_two_runs_are_equal(device):
    runs = []
    for _ in range(2):
        batch, _ = make_batch(device, sizes=[63, 3 * BLOCK + 5])
        runs.append([*anchored_adamw_([batch], 1.0), *tensors_of(batch)])
    assert all(map(torch.equal, *runs))


def test_float_options_are_written_to_the_device_when_they_change(device):
    launcher = op.Launcher()
    first = launcher.place(0, "lr", 1e-2, torch.device(device))
    assert launcher.place(0, "lr", 1e-2, torch.device(device)) is first
    assert launcher.place(0, "lr", 2e-2, torch.device(device)) is first
    assert first == torch.tensor(2e-2)
    own = torch.tensor(1.0, device=device)
    assert launcher.place(0, "lr", own, own.device).data_ptr() == own.data_ptr()


def make_params(device, dtype=F32):
    drawn = draw_tensors([(3, 7), (5, 3)], dtype=F32)
    return [torch.nn.Parameter(t.to(device, dtype)) for t in drawn]


def make_optimizer(params, form, **options):
    group = {"params": params}
    if form == "effective":
        group["lora_pairs"] = [(params[0], params[1], 0.7)]
    options = {"lr": 1e-2, "anchor_weight": 0.05, "weight_decay": 0.1} | options
    return AnchoredAdamW([group], form=form, max_grad_norm=0.5, **options)


def take_steps(params, optimizer, num_steps):
    targets = [t.detach().sin() for t in make_params("cpu")]
    for step in range(num_steps):
        for param, target in zip(params, targets, strict=True):
            distance = param.detach() - target.to(param)
            param.grad = distance * (1 + torch.sin(torch.tensor(float(step)))).item()
        optimizer.step()


@pytest.mark.parametrize("num_steps", [8, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["raw", "effective", "decoupled"])
def test_a_trajectory_strays_no_further_than_plain_float32(device, monkeypatch, form, num_steps):
    runs = [make_params(device), make_params("cpu"), make_params("cpu", torch.float64)]
    fits = op._fit_kernels
    for params in runs:
        own = fits if params is runs[0] else lambda batches: False
        monkeypatch.setattr(op, "_fit_kernels", own)
        take_steps(params, make_optimizer(params, form), num_steps)
    starts = make_params("cpu")
    kernel, plain, exact = (
        [(p.detach().cpu().double() - s.detach()) for p, s in zip(params, starts, strict=True)]
        for params in runs
    )
    # What float32 leaves open, measured; and a few roundings of the largest value.
    allowed = 4 * overall_error(plain, exact) + 1e-6
    assert overall_error(kernel, exact) <= allowed
    assert allowed <= 1e-2


def capture(step):
    """Return a graph of one call, after the warm-up that torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def write_gradients(params, step):
    for param in params:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        param.grad.copy_(torch.sin(param.detach() * (1 + step)))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("form", ["raw", "effective", "decoupled"])
def test_a_captured_step_replays_the_eager_ones_under_a_scheduler(form):
    runs = []
    for captured in (False, True):
        params = make_params("cuda")
        lr = torch.tensor(1e-2, device="cuda")
        optimizer = make_optimizer(params, form, lr=lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)
        skip = torch.zeros((), dtype=torch.bool, device="cuda")

        def step(optimizer=optimizer, skip=skip):
            optimizer.step(skip=skip, skip_non_finite=True)

        write_gradients(params, 0)
        if captured:
            saved = [p.detach().clone() for p in params]
            state = optimizer.state_dict()
            state = {
                **state,
                "state": {
                    k: {n: t.clone() for n, t in v.items()} for k, v in state["state"].items()
                },
            }
            replay = capture(step)
            with torch.no_grad():
                for param, value in zip(params, saved, strict=True):
                    param.copy_(value)
            optimizer.load_state_dict(state)
            step = replay.replay
        norms = []
        for number in range(20):
            write_gradients(params, number)
            skip.fill_(number == 7)
            if number == 11:
                params[0].grad[0, 0] = torch.nan
            step()
            scheduler.step()
            assert optimizer.skipped == (number in (7, 11))
            norms.append(optimizer.grad_norm.nan_to_num(-1.0))
        assert lr < 1e-2
        runs.append([*params, *norms, *(t for p in params for t in optimizer.state[p].values())])
    assert all(map(torch.equal, *runs))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_capture_refuses_a_parameter_without_a_gradient_by_its_index():
    params = make_params("cuda")
    optimizer = make_optimizer(params, "raw")
    write_gradients(params, 0)
    optimizer.step()
    params[1].grad = None
    with (
        pytest.raises(ValueError, match=r"params\[1\]: has no gradient"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_without_an_anchor_it_is_fused_adamw_after_clip_grad_norm():
    shapes = [(64, 640), (1280, 4), (77,), (3, 3, 8, 8)]
    generator = torch.Generator("cuda").manual_seed(0)
    starts = [torch.randn(s, device="cuda", generator=generator) for s in shapes]
    params, others = ([torch.nn.Parameter(s.clone()) for s in starts] for _ in range(2))
    optimizer = AnchoredAdamW(params, lr=1e-2, max_grad_norm=1.0)
    adamw = torch.optim.AdamW(others, lr=1e-2, weight_decay=1e-2, fused=True)
    for step in range(50):
        write_gradients(params, step)
        write_gradients(others, step)
        norm = torch.nn.utils.clip_grad_norm_(others, 1.0)
        optimizer.step()
        adamw.step()
        torch.testing.assert_close(optimizer.grad_norm, norm)
    for param, other, start in zip(params, others, starts, strict=True):
        assert (param - other).norm() <= 1e-4 * (other - start).norm()


FAULTS = {
    "sign": [("grad += 2.0 * weight * difference", "grad -= 2.0 * weight * difference")],
    "factor 2": [("grad += 2.0 * weight * difference", "grad += weight * difference")],
    "mask missing at the end": [("rest < count", "rest < whole + 16")],
    "clip by the squared norm": [("tl.sqrt(tl.sum(squares))", "tl.sum(squares)")],
    "anchor not in the clip norm": [
        (
            "return tl.sum(grad * grad)",
            "grad -= 2.0 * weight * difference\n    return tl.sum(grad * grad)",
        )
    ],
    "stale anchor": [
        (
            "difference = param - load_foreign(anchor_address",
            "difference = 0 * param - load_foreign(anchor_address",
        )
    ],
    "clip forgotten": [("grad * coefficient, beta2", "grad, beta2")],
    "bias correction of the last step": [("step.to(tl.float64) *", "(step.to(tl.float64) + 1) *")],
    "weight missing in the penalty": [("penalty = weight * distance", "penalty = distance")],
}
FAULTS_OF_OTHER_CASES = {
    "flag not read": (
        [
            (
                "moves = tl.load(skipped_ptr) == 0 if skipped_ptr is not None else True",
                "moves = True",
            )
        ],
        {"skip": True, "sizes": [7]},
    ),
    "flag for good": (
        [("skipped = (tl.load(skip_ptr) != 0).to(tl.uint8)", "skipped = 0")],
        {"skip": True, "sizes": [7]},
    ),
    "norm forgets the flag": (
        [
            (
                'tl.where(grad_norm < float("inf"), skipped, 1)',
                '(grad_norm >= float("inf")).to(tl.uint8)',
            )
        ],
        {"skip": True, "skip_non_finite": True, "sizes": [7]},
    ),
    "NaN passes for finite": (
        [
            (
                'tl.where(grad_norm < float("inf"), skipped, 1)',
                'tl.where(grad_norm == float("inf"), 1, skipped)',
            )
        ],
        {"skip_non_finite": True, "bad": torch.nan, "sizes": [7]},
    ),
    "infinity passes for finite": (
        [('grad_norm < float("inf")', "grad_norm == grad_norm")],
        {"skip_non_finite": True, "bad": torch.inf, "sizes": [7]},
    ),
    "skipped step counted": (
        [("counts = skipped == 0", "counts = True")],
        {"skip_non_finite": True, "bad": torch.nan, "sizes": [7]},
    ),
    "decoupled sign": (
        [("change += weight * difference", "change -= weight * difference")],
        {"form": "decoupled", "sizes": [7]},
    ),
    "corrections of another group": (
        [("first_param + tl.load(row_ptr + 8)", "tl.load(row_ptr + 8)")],
        {"sizes": [7], "others": [{"sizes": [5], "betas": (0.5, 0.6)}]},
    ),
    "partials of another group": (
        [("partial_ptr + first_chunk + chunk, square", "partial_ptr + chunk, square")],
        {"sizes": [7], "others": [{"sizes": [5]}]},
    ),
}
CASES = {name: (faults, {"sizes": [63]}) for name, faults in FAULTS.items()} | FAULTS_OF_OTHER_CASES


@pytest.mark.parametrize(("faults", "case"), CASES.values(), ids=CASES.keys())
def test_a_planted_fault_turns_the_comparison_red(device, monkeypatch, tmp_path, faults, case):
    case = dict(case)
    if "skip" in case:
        case["skip"] = torch.tensor(case["skip"], device=device)
    check_step(device, **case)
    from fastppt_kernels.anchored_adamw import triton_kernel, triton_update_kernel

    (piece, _), *_ = faults
    module = triton_kernel if piece in Path(triton_kernel.__file__).read_text() else None
    module = module or triton_update_kernel
    mutant = load_mutant(module.__file__, faults, tmp_path)
    name = module.__name__.rpartition(".")[2]
    monkeypatch.setattr(f"fastppt_kernels.anchored_adamw.{name}", mutant)
    with pytest.raises(AssertionError):
        check_step(device, **case)
