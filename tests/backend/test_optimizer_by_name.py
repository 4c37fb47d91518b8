"""AnchoredAdamW by its dotted name with options from a command line, as trainers make theirs."""

import ast
import importlib

import pytest
import torch

from fastppt_kernels import AnchoredAdamW
from fastppt_kernels.testing import draw_tensors

GIVEN = [
    "anchor_weight=1e-3",
    "form='raw'",
    "anchor='first_step'",
    "betas=(0.9,0.99)",
    "weight_decay=0.1",
    "max_grad_norm=1",
]
OPTIONS = {
    "anchor_weight": 1e-3,
    "form": "raw",
    "anchor": "first_step",
    "betas": (0.9, 0.99),
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
}


def resolve(path):
    """Return the class that a trainer finds for ``--optimizer_type PATH``."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def read_options(arguments):
    """Return what a trainer reads from ``--optimizer_args KEY=VALUE ...``: Python literals."""
    pairs = (argument.split("=") for argument in arguments)
    return {key: ast.literal_eval(value) for key, value in pairs}


def make_params():
    return [torch.nn.Parameter(v) for v in draw_tensors([(3, 7), (5,)])]


def train(params, optimizer):
    for number in range(3):
        for param in params:
            param.grad = torch.sin(param.detach() * (1 + number))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_the_named_class_with_options_from_text_steps_as_the_plain_one():
    params, others = make_params(), make_params()
    groups = [{"params": params[:1], "lr": 1e-2}, {"params": params[1:], "lr": 5e-3}]
    named = resolve("fastppt_kernels.AnchoredAdamW")(groups, lr=1e-4, **read_options(GIVEN))
    train(params, named)
    groups = [{"params": others[:1], "lr": 1e-2}, {"params": others[1:], "lr": 5e-3}]
    train(others, AnchoredAdamW(groups, **OPTIONS))
    assert named.penalty > 0
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    assert not hasattr(named, "train")
    assert not hasattr(named, "eval")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", "1e-4"),
        ("eps", "1e-8"),
        ("weight_decay", "0.01"),
        ("anchor_weight", "1e-3"),
        ("max_grad_norm", "1.0"),
        ("max_grad_norm", True),
        ("seed", "0"),
        ("seed", True),
        ("seed", 0.5),
        ("betas", "(0.9,0.99)"),
        ("betas", (0.9,)),
        ("betas", ("0.9", "0.99")),
        ("lr", None),
        ("form", 1),
        ("anchor", "none"),
        ("moments", 8),
    ],
)
def test_an_option_of_another_type_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"{name}.*got .*want"):
        AnchoredAdamW(make_params(), **{name: value})


@pytest.mark.slow
@pytest.mark.parametrize("what", ["step", "loop", "network"])
def test_compiled_code_around_it_leaves_the_step_as_it_is(what):
    def run(compiles):
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 4).double()
        optimizer = AnchoredAdamW(net.parameters(), lr=1e-2, anchor_weight=0.1, max_grad_norm=0.1)
        compile_ = torch.compile(backend="eager" if what != "network" else "aot_eager")
        forward = compile_(net) if compiles and what == "network" else net
        step = compile_(optimizer.step) if compiles and what == "step" else optimizer.step
        inputs = torch.randn(3, 4, dtype=torch.float64)

        def loop():
            optimizer.zero_grad()
            forward(inputs).square().mean().backward()
            step()

        loop = compile_(loop) if compiles and what == "loop" else loop
        seen = []
        for _ in range(3):
            loop()
            seen.append((optimizer.penalty.item(), optimizer.grad_norm.item()))
        torch._dynamo.reset()
        return torch.tensor(seen), net.weight.detach()

    (seen, weight), (plain_seen, plain_weight) = run(True), run(False)
    torch.testing.assert_close(seen, plain_seen, rtol=1e-12, atol=0)
    torch.testing.assert_close(weight, plain_weight, rtol=1e-12, atol=0)
    assert plain_seen.min(0).values[1] > 0
