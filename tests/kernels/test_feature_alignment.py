import pytest
import torch

from fastppt_kernels import align_features, feature_alignment_loss, feature_statistics
from fastppt_kernels.feature_alignment import op
from fastppt_kernels.feature_alignment.reference import (
    feature_alignment_reference,
    feature_statistics_reference,
)
from fastppt_kernels.testing import INTERPRETED, ForbidHostReads, draw_tensors, worst_error

pytestmark = pytest.mark.skipif(INTERPRETED, reason="is about the PyTorch path")

EPS = 1e-6
# Of the two losses in what is differentiated.
WEIGHTS = (0.7, -1.3)
SHAPES = {
    "one position": (2, 3, 1, 1),
    "one channel": (3, 1, 1, 7),
    "63 positions": (2, 7, 9, 7),
    "65 channels": (1, 65, 4, 5),
    "over one piece": (2, 300, 31, 33),
}
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# As acceptance has them: the statistics of a narrow tensor are float32, its gradient is narrow.
TOLERANCES = {F64: 1e-12, F32: 1e-5, BF16: 1e-5, F16: 1e-5}
GRAD_TOLERANCES = {F64: 1e-12, F32: 1e-5, BF16: 1e-2, F16: 1e-2}


class _Slices:
    def __getitem__(self, item):
        return item


SLICES = _Slices()


def in_a_larger(shape, window):
    """Return a view of the shape into NaNs, from the shape of the larger and the view's place."""

    def lay(values):
        larger = torch.full(shape(*values.shape), torch.nan, dtype=values.dtype)
        view = larger.to(values.device)[window(*values.shape)]
        return view.copy_(values)

    return lay


def channels_last(values):
    return values.contiguous(memory_format=torch.channels_last)


def tokens(values):
    return values.flatten(2).mT.contiguous()


# From [B, C, H, W] in memory of its own to the layouts that networks have, and -1 of tokens.
LAYOUTS = {
    "contiguous": (torch.clone, 1),
    "channels_last": (channels_last, 1),
    "some of the channels": (
        in_a_larger(lambda b, c, h, w: (b, c + 3, h, w), lambda b, c, h, w: SLICES[:, 2 : c + 2]),
        1,
    ),
    "some of the rows": (
        in_a_larger(
            lambda b, c, h, w: (b, c, h + 2, w), lambda b, c, h, w: SLICES[:, :, 1 : h + 1]
        ),
        1,
    ),
    "a crop": (
        in_a_larger(
            lambda b, c, h, w: (b, c, h + 2, w + 3),
            lambda b, c, h, w: SLICES[:, :, 1 : h + 1, 2 : w + 2],
        ),
        1,
    ),
    "every other column": (
        in_a_larger(lambda b, c, h, w: (b, c, h, 2 * w), lambda b, c, h, w: SLICES[..., ::2]),
        1,
    ),
    "tokens": (tokens, -1),
    "tokens behind others": (
        lambda values: in_a_larger(lambda b, n, c: (b, n + 3, c), lambda b, n, c: SLICES[:, 3:])(
            tokens(values)
        ),
        -1,
    ),
    "tokens [B, H, W, C]": (lambda values: values.movedim(1, -1).contiguous(), -1),
}


def make(shape, dtype=F64, mean=2.0):
    """Return features and base statistics that differ from theirs by their own size."""
    num_samples, num_channels = shape[:2]
    drawn = draw_tensors([shape, (num_samples, num_channels), (num_samples, num_channels)])
    stats_dtype = F64 if dtype == F64 else F32
    return (drawn[0] + mean).to(dtype), drawn[1].to(stats_dtype), drawn[2].abs().to(stats_dtype)


def check(features, base_mean, base_std, channel_dim=1, run=feature_alignment_loss):
    """Compare losses and gradient with float64 on the same values."""
    leaf = features.detach().requires_grad_()
    losses = run(leaf, base_mean, base_std, channel_dim=channel_dim, eps=EPS)
    (grad,) = torch.autograd.grad(sum(w * x for w, x in zip(WEIGHTS, losses, strict=True)), leaf)
    exact = features.detach().double().requires_grad_()
    wanted = feature_alignment_reference(
        exact, base_mean, base_std, channel_dim=channel_dim, eps=EPS
    )
    total = sum(w * x for w, x in zip(WEIGHTS, wanted, strict=True))
    (wanted_grad,) = torch.autograd.grad(total, exact)
    dtype = features.dtype
    assert (
        worst_error([x.detach() for x in losses], [x.detach() for x in wanted])
        <= (TOLERANCES[dtype])
    )
    assert worst_error([grad], [wanted_grad]) <= GRAD_TOLERANCES[dtype]
    assert grad.dtype == dtype
    assert grad.stride() == torch.empty_like(features).stride()


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_losses_and_gradient_equal_the_reference(shape, dtype):
    check(*make(shape, dtype))


@pytest.mark.parametrize("dtype", [F64, BF16])
@pytest.mark.parametrize(("lay", "channel_dim"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_memory_layout_gives_the_same(lay, channel_dim, dtype):
    features, base_mean, base_std = make((2, 6, 5, 8), dtype)
    check(lay(features), base_mean, base_std, channel_dim)


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_statistics_and_their_gradient_equal_the_reference(channel_dim):
    features, mean_weight, std_weight = make((2, 7, 7, 5))
    features = features if channel_dim == 1 else features.movedim(1, -1)
    results = []
    for run in (feature_statistics, feature_statistics_reference):
        leaf = features.clone().requires_grad_()
        mean, std = run(leaf, channel_dim=channel_dim, eps=EPS)
        (grad,) = torch.autograd.grad((mean * mean_weight + std * std_weight).sum(), leaf)
        (mean_grad,) = torch.autograd.grad(run(leaf, channel_dim=channel_dim)[0].sum(), leaf)
        (std_grad,) = torch.autograd.grad(run(leaf, channel_dim=channel_dim)[1].sum(), leaf)
        results.append([t.detach() for t in (mean, std, grad, mean_grad, std_grad)])
    assert worst_error(*results) <= 1e-12


@pytest.mark.parametrize("term", [0, 1], ids=["mean", "std"])
def test_each_loss_has_its_own_gradient(term):
    features, base_mean, base_std = make((2, 7, 7, 5))
    grads = []
    for run in (feature_alignment_loss, feature_alignment_reference):
        leaf = features.clone().requires_grad_()
        grads += torch.autograd.grad(run(leaf, base_mean, base_std)[term], leaf)
    assert worst_error(grads[:1], grads[1:]) <= 1e-12


def test_a_large_mean_leaves_the_deviation_right():
    features, base_mean, base_std = make((1, 8, 40, 50), F32, mean=300.0)
    check(features, base_mean, base_std)
    _, std = feature_statistics(features)
    naive = (features.square().mean((2, 3)) - features.mean((2, 3)).square() + EPS).sqrt()
    wanted = feature_statistics_reference(features)[1]
    assert worst_error([std], [wanted]) < 1e-5 < worst_error([naive], [wanted])


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize(("lay", "channel_dim"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_features_of_the_base_have_no_loss_and_no_gradient(lay, channel_dim, dtype):
    features = lay(make((2, 6, 5, 8), dtype)[0]).detach().requires_grad_()
    with torch.no_grad():
        base = feature_statistics(features, channel_dim=channel_dim)
    losses = feature_alignment_loss(features, *base, channel_dim=channel_dim)
    assert [float(x.detach()) for x in losses] == [0.0, 0.0]
    sum(losses).backward()
    assert not features.grad.any()


@pytest.mark.parametrize("dtype", [F64, F32, F16])
@pytest.mark.parametrize("value", [0.0, 3.7, -1000.0])
def test_features_without_variance_have_finite_losses_and_gradients(dtype, value):
    features = torch.full((2, 3, 4, 4), value, dtype=dtype, requires_grad=True)
    _, base_mean, base_std = make((2, 3, 4, 4), dtype)
    _, std = feature_statistics(features.detach())
    torch.testing.assert_close(std, torch.full_like(std, EPS**0.5), rtol=1e-2, atol=0)
    losses = feature_alignment_loss(features, base_mean, base_std)
    sum(losses).backward()
    assert all(x.isfinite() for x in losses) and features.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_results_have_the_promised_dtypes(dtype):
    wanted = F64 if dtype == F64 else F32
    features, base_mean, base_std = make((2, 3, 4, 4), dtype)
    statistics = feature_statistics(features)
    losses = feature_alignment_loss(features, base_mean.to(BF16), base_std.double())
    assert {t.dtype for t in (*statistics, *losses)} == {wanted}
    assert [t.shape for t in (*statistics, *losses)] == [(2, 3), (2, 3), (), ()]


def test_the_base_gets_no_gradient():
    features, base_mean, base_std = (t.requires_grad_() for t in make((2, 3, 4, 4)))
    sum(feature_alignment_loss(features, base_mean, base_std)).backward()
    assert features.grad is not None
    assert base_mean.grad is None and base_std.grad is None
    # Nor does what the statistics are of: zeros would cost a backward of the base's pass.
    features, base = (make((2, 3, 4, 4))[0].requires_grad_() for _ in range(2))
    sum(feature_alignment_loss(features, *feature_statistics(base))).backward()
    assert features.grad is not None and base.grad is None


def test_the_gradient_is_added_to_what_else_flows_into_the_features():
    features, base_mean, base_std = make((2, 3, 4, 4))
    grads = []
    for weight in (0.0, 1.0):
        leaf = features.clone().requires_grad_()
        losses = feature_alignment_loss(leaf, base_mean, base_std)
        (leaf.square().sum() + weight * sum(losses)).backward()
        grads.append(leaf.grad)
    leaf = features.clone().requires_grad_()
    (alone,) = torch.autograd.grad(sum(feature_alignment_loss(leaf, base_mean, base_std)), leaf)
    torch.testing.assert_close(grads[1] - grads[0], alone, rtol=1e-9, atol=1e-12)


def test_two_runs_are_equal():
    arguments = make(SHAPES["over one piece"], F32)
    first, second = (feature_alignment_loss(*arguments) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_autocast_changes_nothing():
    features, base_mean, base_std = make((2, 7, 9, 7), F32)
    results = []
    for enabled in (False, True):
        leaf = features.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = feature_alignment_loss(leaf, base_mean, base_std)
        results.append([*losses, *torch.autograd.grad(sum(losses), leaf)])
    assert all(map(torch.equal, *results))


def test_nothing_is_read_on_the_host():
    features, base_mean, base_std = make((2, 7, 9, 7), BF16)
    # The mode does not see into an operation.
    with ForbidHostReads():
        mean, std = op.plain_statistics(features, EPS)
        op.plain_backward(features, mean, std, base_mean, base_std, features)
        feature_alignment_loss(features.requires_grad_(), base_mean, base_std)[0].backward()
        aligned, mean_loss, _ = align_features(features, base_mean, base_std)
        (aligned.sum() + mean_loss).backward()


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("lay", [torch.clone, channels_last])
def test_opcheck_is_green(lay, dtype):
    features, base_mean, base_std = make((2, 7, 3, 5), dtype)
    features = lay(features).requires_grad_()
    torch.library.opcheck(torch.ops.fastppt_kernels.feature_statistics, (features, EPS))
    torch.library.opcheck(
        torch.ops.fastppt_kernels.feature_alignment, (features, base_mean, base_std, EPS)
    )
    mean, std = feature_statistics(features.detach())
    arguments = (features.detach(), mean, std, None, None, base_mean, base_std)
    torch.library.opcheck(torch.ops.fastppt_kernels.feature_backward, (*arguments, None))
    torch.library.opcheck(
        torch.ops.fastppt_kernels.feature_backward, (*arguments, torch.ones_like(features.detach()))
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(backend):
    features, base_mean, base_std = make((2, 7, 3, 5), F32)

    def run(leaf):
        mean, std = feature_statistics(leaf * 2)
        losses = feature_alignment_loss(leaf.transpose(1, 2), base_mean, base_std, channel_dim=-1)
        return mean.sum() + (std * 0.3).sum() + losses[0] + 0.7 * losses[1]

    features = features[:, :, 0]
    results = []
    for call in (run, torch.compile(run, fullgraph=True, backend=backend)):
        leaf = features.clone().requires_grad_()
        value = call(leaf)
        results.append([value.detach(), *torch.autograd.grad(value, leaf)])
    assert worst_error(*results) < 1e-6


@pytest.mark.parametrize("run", [feature_statistics, feature_alignment_loss, align_features])
def test_a_second_derivative_is_refused(run):
    features, *base = make((2, 7, 3, 5))
    leaf = features.requires_grad_()
    results = run(leaf) if run is feature_statistics else run(leaf, *base)
    (grad,) = torch.autograd.grad(results[1].sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again; call backward without"):
        grad.sum().backward()


def read(values):
    """A loss by a consumer of the features, so that each element's gradient is its own."""
    return (values.double() * torch.arange(1.0, values.numel() + 1).view(values.shape).sin()).sum()


def check_aligned(features, base_mean, base_std, channel_dim=1, run=align_features):
    """Compare the gradient of features that two others read, and of the losses, with float64."""
    leaf = features.detach().requires_grad_()
    aligned, *losses = run(leaf, base_mean, base_std, channel_dim=channel_dim, eps=EPS)
    assert torch.equal(aligned, features)
    assert (aligned.dtype, aligned.stride()) == (features.dtype, features.stride())
    plain = feature_alignment_loss(leaf, base_mean, base_std, channel_dim=channel_dim, eps=EPS)
    assert all(map(torch.equal, losses, plain))
    total = sum(w * x for w, x in zip(WEIGHTS, losses, strict=True))
    (grad,) = torch.autograd.grad(1e-2 * (read(aligned) + read(aligned * 2)) + total, leaf)
    exact = features.detach().double().requires_grad_()
    wanted = feature_alignment_reference(
        exact, base_mean, base_std, channel_dim=channel_dim, eps=EPS
    )
    total = sum(w * x for w, x in zip(WEIGHTS, wanted, strict=True))
    wanted_grads = torch.autograd.grad(1e-2 * (read(exact) + read(exact * 2)) + total, exact)
    dtype = features.dtype
    assert worst_error([grad], wanted_grads) <= GRAD_TOLERANCES[dtype]
    assert (grad.dtype, grad.stride()) == (dtype, torch.empty_like(features).stride())


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_features_that_go_on_have_both_gradients(shape, dtype):
    check_aligned(*make(shape, dtype))


@pytest.mark.parametrize("dtype", [F64, BF16])
@pytest.mark.parametrize(("lay", "channel_dim"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_features_of_every_layout_go_on_with_both_gradients(lay, channel_dim, dtype):
    features, base_mean, base_std = make((2, 6, 5, 8), dtype)
    check_aligned(lay(features), base_mean, base_std, channel_dim)


# What flows into the features, where they are [B, C, H, W] and contiguous.
INCOMING = {
    "alike": torch.clone,
    "channels_last": channels_last,
    "of another dtype": torch.Tensor.float,
    "the same for all": lambda values: values.new_ones(()).expand(values.shape),
}


@pytest.mark.parametrize("lay", INCOMING.values(), ids=INCOMING.keys())
def test_what_flows_in_may_have_a_layout_of_its_own(lay):
    features, base_mean, base_std = make((2, 6, 5, 8), BF16)
    incoming = lay(draw_tensors([features.shape], seed=3)[0].to(BF16))
    mean, std = feature_statistics(features)
    given = (features, mean, std, base_mean, base_std, *torch.tensor(WEIGHTS))
    grad = op._backward(*given, incoming)
    assert grad.stride() == features.stride() and grad.dtype == BF16
    assert torch.equal(grad, op._backward(*given, incoming.to(BF16).contiguous()))
    alone = op._backward(*(t.double() for t in given), None)
    wanted = incoming.double() + alone
    # Rounded once, to the nearest.
    assert torch.equal(grad, wanted.float().to(BF16))


def test_both_gradients_are_rounded_together():
    features, *base = make((2, 6, 15, 18), BF16)
    exact, leaf, other = (features.to(d).requires_grad_() for d in (F64, BF16, BF16))
    results = []
    for values, run in ((exact, feature_alignment_reference), (other, feature_alignment_loss)):
        losses = run(values, *base, eps=EPS)
        results += torch.autograd.grad(1e-3 * read(values) + sum(losses), values)
    aligned, *losses = align_features(leaf, *base, eps=EPS)
    (grad,) = torch.autograd.grad(1e-3 * read(aligned) + sum(losses), leaf)
    wanted, apart = results
    assert 1.2 * worst_error([grad], [wanted]) < worst_error([apart], [wanted])


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_features_of_the_base_pass_their_gradient_on_bit_by_bit(dtype):
    features = make((2, 6, 5, 8), dtype)[0].requires_grad_()
    base = feature_statistics(features.detach())
    aligned, *losses = align_features(features, *base)
    incoming = draw_tensors([features.shape], seed=3)[0].to(dtype)
    ((aligned * incoming).sum() + sum(losses)).backward()
    assert torch.equal(features.grad, incoming)


@pytest.mark.parametrize("read_ones", [[0], [1], [2], [1, 2], [0, 2]])
def test_any_of_the_three_may_be_left_unread(read_ones):
    features, *base = make((2, 7, 7, 5))
    grads = []
    for run in (align_features, lambda x, *base: (x, *feature_alignment_reference(x, *base))):
        leaf = features.clone().requires_grad_()
        results = run(leaf, *base)
        total = sum(read(results[i]) if i == 0 else results[i] for i in read_ones)
        grads += torch.autograd.grad(total, leaf)
    assert worst_error(grads[:1], grads[1:]) <= 1e-12


def test_the_features_that_go_on_are_no_copy_and_refuse_to_be_written():
    features, *base = make((2, 3, 4, 4))
    leaf = features.requires_grad_()
    aligned = align_features(leaf, *base)[0]
    assert aligned.data_ptr() == leaf.data_ptr()
    with pytest.raises(RuntimeError, match="being modified inplace"):
        aligned.add_(1)


class Layer(torch.nn.Module):
    """A layer whose output a hook replaces, and what reads it."""

    def __init__(self, base):
        super().__init__()
        self.inner = torch.nn.Conv2d(7, 7, 1, dtype=F64)
        self.outer = torch.nn.Conv2d(7, 2, 1, dtype=F64)
        self.base, self.losses = base, ()
        for param, values in zip(
            self.parameters(), draw_tensors([p.shape for p in self.parameters()]), strict=True
        ):
            param.data = values
        self.inner.register_forward_hook(self.align)

    def align(self, layer, inputs, output):
        aligned, *self.losses = align_features(output, *self.base)
        return aligned

    def forward(self, values):
        return self.outer(self.inner(values).sin())


def run_layer(base, features, *, compiled=False, checkpointed=False):
    """Return the gradients of the features and of the layer's parameters."""
    layer = Layer(base)
    if compiled:
        layer.compile(fullgraph=True, backend="aot_eager")
    leaf = features.clone().requires_grad_()
    if checkpointed:
        out = torch.utils.checkpoint.checkpoint(layer, leaf, use_reentrant=False)
    else:
        out = layer(leaf)
    (read(out) + sum(layer.losses)).backward()
    return [leaf.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize(("compiled", "checkpointed"), [(0, 1), (1, 0), (1, 1)])
def test_a_hook_replaces_features_in_compiled_and_in_checkpointed_layers(compiled, checkpointed):
    features, *base = make((2, 7, 3, 5))
    wanted = run_layer(base, features)
    given = run_layer(base, features, compiled=compiled, checkpointed=checkpointed)
    assert worst_error(given, wanted) <= 1e-12


WRONG = {
    "two dimensions": ({"features": torch.ones(2, 3)}, r"features: got shape \(2, 3\), want \[B"),
    "no position": ({"features": torch.ones(2, 3, 0)}, "features: .* at least one element"),
    "integers": ({"features": torch.ones(2, 3, 4).long()}, "features: got dtype torch.int64"),
    "channel_dim": ({"channel_dim": 2}, "channel_dim: got 2, want 1 or -1"),
    "eps": ({"eps": 0.0}, "eps: got 0.0, want > 0"),
    "base of tokens": ({"channel_dim": -1}, r"base_mean: got shape \(2, 3\), want \(2, 4\)"),
    "base_std": ({"base_std": torch.ones(3)}, r"base_std: got shape \(3,\), want \(2, 3\)"),
    "integer base": ({"base_mean": torch.ones(2, 3).int()}, "base_mean: got dtype torch.int32"),
    "device": ({"base_std": torch.ones(2, 3, device="meta")}, "base_std: is on meta, want cpu"),
}


@pytest.mark.parametrize(("spoilt", "message"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("run", [feature_alignment_loss, align_features])
def test_wrong_input_is_named(run, spoilt, message):
    right = {"features": torch.ones(2, 3, 4), "base_mean": torch.ones(2, 3)}
    right |= {"base_std": torch.ones(2, 3)}
    run(**right)
    with pytest.raises(ValueError, match=message):
        run(**right | spoilt)


def planted(deviations=None, mean_of=None, gradient=lambda grad: grad):
    """Return the reference with a fault: in the variance, in the sum, or in the gradient."""

    def run(features, base_mean, base_std, *, channel_dim=1, eps=EPS):
        values = features.movedim(channel_dim, 1).flatten(2)
        values.register_hook(gradient)
        mean = values.mean(2)
        std = (deviations or right_deviations)(values, mean, eps)
        squares = (mean - base_mean).square(), (std - base_std).square()
        return tuple((mean_of or right_mean)(s) for s in squares)

    return run


def right_deviations(values, mean, eps):
    return ((values - mean[:, :, None]).square().mean(2) + eps).sqrt()


def right_mean(squares):
    return squares.sum(1).mean()


FAULTS = {
    "sample variance": planted(lambda x, m, e: (x.var(2) + e).sqrt()),
    "eps outside of the root": planted(lambda x, m, e: x.var(2, correction=0).sqrt() + e),
    "eps left out": planted(lambda x, m, e: x.var(2, correction=0).sqrt()),
    "variance for deviation": planted(lambda x, m, e: x.var(2, correction=0) + e),
    "mean without gradient": planted(lambda x, m, e: right_deviations(x, m.detach() + 1e-3, e)),
    "mean over channels": planted(mean_of=torch.mean),
    "sum over samples": planted(mean_of=torch.sum),
    "wrong sign": planted(gradient=torch.neg),
    "factor 2 missing": planted(gradient=lambda grad: grad / 2),
}


def test_the_reference_without_a_fault_is_green():
    check(*make((2, 7, 9, 7)), run=planted())


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_turns_the_comparison_red(fault):
    with pytest.raises(AssertionError):
        check(*make((2, 7, 9, 7)), run=fault)


ALIGNED_FAULTS = {
    "nothing flows on": lambda grad, incoming: grad,
    "the losses have no gradient": lambda grad, incoming: incoming.clone(),
    "added twice": lambda grad, incoming: grad + 2 * incoming,
    "wrong sign": lambda grad, incoming: incoming - grad,
    "channels exchanged": lambda grad, incoming: grad + incoming.flip(1),
}


@pytest.mark.parametrize("fault", ALIGNED_FAULTS.values(), ids=ALIGNED_FAULTS.keys())
@pytest.mark.parametrize("dtype", [F64, BF16])
def test_a_fault_in_how_the_gradient_is_added_turns_the_comparison_red(monkeypatch, fault, dtype):
    backward = op.plain_backward

    def planted(*given):
        return fault(backward(*given[:-1], None), given[-1])

    check_aligned(*make((2, 7, 9, 7), dtype))
    monkeypatch.setattr(op, "plain_backward", planted)
    with pytest.raises(AssertionError):
        check_aligned(*make((2, 7, 9, 7), dtype))
