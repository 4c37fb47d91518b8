"""Every public operation once, forward and backward: `python every_operation.py FILE [MODULE...]`.

It needs torch and fastppt_kernels alone, so that it runs where nothing else is installed. As a
program it first imports each MODULE, which must fail for want of that module, then writes the
numbers to FILE.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys

import torch
from torch import Tensor

import fastppt_kernels as kernels


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def leaf(*shape: int, seed: int) -> Tensor:
    return draw(*shape, seed=seed).requires_grad_()


def run_all() -> dict[str, list[Tensor]]:
    """Return what each name of the public face computes: its values, then its gradients."""
    return {**penalties(), **optimizer(), **maps(), **joint(), **features(), **denoising()}


def penalties() -> dict[str, list[Tensor]]:
    params, anchors = [draw(3, 5, seed=1), draw(7, seed=2)], [None, draw(7, seed=3)]
    grads = [draw(3, 5, seed=4), draw(7, seed=5)]
    raw = kernels.anchor_penalty_(params, anchors, grads, 0.5)
    down, up = draw(2, 6, seed=6), draw(5, 2, seed=7)
    pair_grads = [draw(2, 6, seed=8), draw(5, 2, seed=9)]
    effective = kernels.lora_anchor_penalty_(
        *([down], [up], [2.0], pair_grads[:1], pair_grads[1:], 0.5),
        anchor_downs=[draw(2, 6, seed=10)],
        anchor_ups=[draw(5, 2, seed=11)],
    )
    return {"anchor_penalty_": [raw, *grads], "lora_anchor_penalty_": [effective, *pair_grads]}


def optimizer() -> dict[str, list[Tensor]]:
    results = []
    for form in ("raw", "effective", "decoupled"):
        down, up = leaf(2, 6, seed=12), leaf(5, 2, seed=13)
        group = {"params": [down, up]}
        if form == "effective":
            group["lora_pairs"] = [(down, up, 1.5)]
        adamw = kernels.AnchoredAdamW(
            [group], lr=0.1, anchor_weight=0.3, anchor="start", form=form, max_grad_norm=0.7
        )
        for seed in (14, 15):
            adamw.zero_grad()
            (up @ down - draw(5, 6, seed=seed)).square().sum().backward()
            adamw.step()
        results += [down.detach(), up.detach(), adamw.penalty, adamw.grad_norm]
    return {"AnchoredAdamW": results}


def maps() -> dict[str, list[Tensor]]:
    query, key = leaf(2, 3, 9, 8, seed=16), leaf(2, 3, 4, 8, seed=17)
    total = kernels.attention_map_sum(query, key)
    sums = [total, *torch.autograd.grad(total.square().sum(), (query, key))]
    base = kernels.attention_map_sum(draw(2, 3, 9, 8, seed=18), draw(2, 3, 4, 8, seed=19))
    loss = kernels.attention_alignment_loss(query, key, base)
    grads = torch.autograd.grad(loss, (query, key))
    return {"attention_map_sum": sums, "attention_alignment_loss": [loss, *grads]}


def joint() -> dict[str, list[Tensor]]:
    inputs = [leaf(2, 3, 13, 8, seed=seed) for seed in (20, 21, 22)]
    output, total = kernels.joint_attention_map_sum(
        *(draw(2, 3, 13, 8, seed=seed) for seed in (23, 24, 25)), num_text_tokens=4
    )
    tuned, loss = kernels.joint_attention(*inputs, num_text_tokens=4, base_map_sum=total)
    grads = torch.autograd.grad(tuned.square().sum() + loss, inputs)
    return {"joint_attention_map_sum": [output, total], "joint_attention": [tuned, loss, *grads]}


def features() -> dict[str, list[Tensor]]:
    hidden = leaf(2, 5, 4, 4, seed=26)
    base = kernels.feature_statistics(draw(2, 5, 4, 4, seed=27))
    results = {}
    for name, outputs in {
        "feature_statistics": kernels.feature_statistics(hidden),
        "feature_alignment_loss": kernels.feature_alignment_loss(hidden, *base),
        "align_features": kernels.align_features(hidden, *base),
    }.items():
        total = sum(output.square().sum() for output in outputs)
        results[name] = [*outputs, *torch.autograd.grad(total, hidden)]
    return results


def denoising() -> dict[str, list[Tensor]]:
    prediction = leaf(3, 4, 5, 5, seed=28)
    base, target = draw(3, 4, 5, 5, seed=29), draw(3, 4, 5, 5, seed=30)
    unseen = torch.full((10,), torch.nan)
    outputs = kernels.adaptive_denoising_loss(
        *(prediction, base, target, torch.tensor([1, 9, 1]), unseen, unseen.clone()),
        temperature=0.1,
    )
    return {"adaptive_denoising_loss": [*outputs, *torch.autograd.grad(outputs[0], prediction)]}


def import_everything(without: list[str]) -> None:
    """Import the whole package; modules of Triton's kernels may lack triton, if that is absent."""
    for module in pkgutil.walk_packages(kernels.__path__, "fastppt_kernels."):
        missing = missing_for(module.name)
        may_miss = (
            (None, "triton") if ".triton_" in module.name and "triton" in without else (None,)
        )
        if missing not in may_miss:
            sys.exit(f"{module.name} lacks {missing}")


def missing_for(module: str) -> str | None:
    """Return the name of what cannot be found when a module is imported; None if all is there."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return error.name
    return None


def main(file: str, without: list[str]) -> None:
    for name in without:
        if missing_for(name) != name:
            sys.exit(f"{name} is not absent here")
    import_everything(without)
    torch.set_num_threads(1)
    torch.save({name: [t.detach() for t in each] for name, each in run_all().items()}, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
