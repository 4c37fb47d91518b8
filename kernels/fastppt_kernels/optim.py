"""AdamW with an anchor and a gradient clip in one step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fastppt_kernels.anchor_penalty.op import anchor_penalty_, apply_anchor_
from fastppt_kernels.checks import compute_dtype
from fastppt_kernels.lora_anchor_penalty.op import lora_anchor_penalty_
from fastppt_kernels.lora_pairs import Pair, Place, locate_pairs

FORMS = ("raw", "effective", "decoupled")
ANCHORS = ("start", "zero")


class AnchoredAdamW(Optimizer):
    """AdamW that pulls the parameters back to their anchor, and clips with the anchor counted.

    One step, with g the gradients of the loss:
        1. form "raw":        g += 2 anchor_weight (theta - theta_0)
           form "effective":  g += gradient of anchor_weight sum ||s B A - s B0 A0||^2
        2. grad_norm = ||g|| over all groups,  g *= min(1, max_grad_norm / (grad_norm + 1e-6))
        3. AdamW: theta *= 1 - lr weight_decay; moments; theta -= lr m / (sqrt(v) + eps)
           form "decoupled": with the weight decay, theta -= lr anchor_weight (theta - theta_0),
           both of theta as it was before the step.

    Source: Preserve and Personalize (arXiv 2505.19519), Algorithm 1, line 9, for the penalty;
    Decoupled Weight Decay Regularization (arXiv 1711.05101), Algorithm 2, for AdamW. Our choice:
    the clip counts the anchor, and the effective and the decoupled form.

    With ``anchor_weight=0`` this is ``clip_grad_norm_`` and ``torch.optim.AdamW``.

    Args:
        params: Floating-point parameters, or groups of them, the parameters of a group on one
            device. A group may override ``lr``, ``betas``, ``eps``, ``weight_decay``,
            ``anchor_weight``, ``form`` and ``anchor``. A group of form "effective" also holds
            ``lora_pairs``, a list of (down, up, scale): down [rank, in] and up [out, rank] are
            parameters of the group or contiguous views into them. They are looked up once, here.
        lr: Learning rate, a float or a 0-dim tensor (on the parameters' device, if the step is
            captured in a CUDA graph; changed in place it then acts on the replays).
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: AdamW's, decoupled.
        anchor_weight: Factor of the penalty, a float or a 0-dim tensor on the parameters' device.
            The float 0 does no work and keeps no anchor.
        anchor: "start": the values at the time when the group is added, kept as
            ``state[p]["anchor"]``. "zero": nothing is kept or read. A list: one tensor, or None
            for zeros, for each parameter over all groups in order (for each of the group's, where
            a group gives it). For form "effective" an anchor whose B0 A0 are all zero (all ups or
            all downs are) is kept as "zero".
        form: "raw", "effective" or "decoupled".
        max_grad_norm: The largest norm, over all groups; None: no clip.

    Attributes:
        penalty: 0-dim device tensor, the sum of the groups' penalties at the last step, of the
            values before it. For "decoupled" too: anchor_weight sum ||theta - theta_0||^2.
        grad_norm: 0-dim device tensor, the norm of step 2 before the clip.

    Raises:
        ValueError: An option out of its range; an anchor of another shape or of too few entries;
            "effective" without ``lora_pairs``, with a pair that lies in no parameter of the group
            or a parameter that no pair lies in (named by their indices).

    A parameter without a gradient is left out, as in torch; so is a pair without both gradients.
    A step reads nothing on the host. State is made with the group, so that a captured step
    allocates none. Anchors are part of the state_dict, or a resumed run would be held at the
    values it resumed from; ``load_state_dict`` writes into the state's tensors where they are.
    What ``.grad`` holds after a step is not part of the contract.

    Rounding: float16 and bfloat16 parameters have float32 moments; their gradients are widened
    first, and the new value is rounded once.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        anchor_weight: float | Tensor = 0.0,
        anchor: str | Sequence[Tensor | None] = "start",
        form: str = "raw",
        max_grad_norm: float | None = None,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: got {max_grad_norm}, want a number > 0, or None")
        self.max_grad_norm = max_grad_norm
        self.penalty = self.grad_norm = torch.zeros(())
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "anchor_weight": anchor_weight,
            "form": form,
        }
        self._default_anchor: str = "start"
        if isinstance(anchor, str):
            self._default_anchor = anchor
            super().__init__(params, defaults)
        else:
            super().__init__(_share_out(params, anchor), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with its anchor and the places of its LoRA pairs.

        Args:
            param_group: ``params`` and any of the options that a group may override.

        Raises:
            ValueError: As the class says. The optimizer is then as it was.
        """
        param_group = dict(param_group)
        anchor = param_group.pop("anchor", self._default_anchor)
        pairs = param_group.pop("lora_pairs", None)
        super().add_param_group(param_group)
        # torch normalises the group and appends it; a group that we then refuse goes again.
        group = self.param_groups.pop()
        _check_options(group)
        if group["form"] == "effective":
            if pairs is None:
                raise ValueError(
                    'form "effective": the group has no lora_pairs; '
                    "pass lora_pairs=[(down, up, scale), ...] in the group"
                )
            group["lora_pairs"] = locate_pairs(group["params"], pairs)
        elif pairs is not None:
            raise ValueError(
                f'lora_pairs: the group\'s form is "{group["form"]}"; want "effective", or no pairs'
            )
        group["anchor"], anchors = _resolve_anchor(group, anchor)
        for param, value in zip(group["params"], anchors, strict=True):
            dtype = _wide(param.dtype)
            state = {
                "step": torch.zeros((), dtype=torch.float32, device=param.device),
                "exp_avg": torch.zeros_like(param, dtype=dtype, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(param, dtype=dtype, requires_grad=False),
            }
            if value is not None:
                state["anchor"] = value
            self.state[param] = state
        self.param_groups.append(group)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; see the class for its equations.

        Args:
            closure: Computes the loss anew and returns it.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            ValueError: A gradient of another shape or device than its parameter, or sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            batches = [self._gather(group) for group in self.param_groups]
            every = (p for group in self.param_groups for p in group["params"])
            device = next((p.device for p in every), torch.device("cpu"))
            self.penalty = _total([_anchor_(batch) for batch in batches], device)
            self.grad_norm = _total([_squared_norm(batch) for batch in batches], device).sqrt()
            for batch in batches:
                if self.max_grad_norm is not None and batch.grads:
                    coefficient = (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
                    torch._foreach_mul_(batch.grads, coefficient.to(batch.grads[0].device))
                _update_(batch)
        return loss

    def _gather(self, group: dict[str, Any]) -> "_Batch":
        """Return the group's parameters that have gradients, with these and their state."""
        places = {i: p for i, p in enumerate(group["params"]) if p.grad is not None}
        params = list(places.values())
        for index, param in places.items():
            if param.grad.layout != torch.strided:
                raise ValueError(f"params[{index}]: its gradient is sparse, want a dense one")
        states = [self.state[p] for p in params]
        return _Batch(
            group=group,
            indices=list(places),
            params=params,
            grads=[p.grad.to(_wide(p.dtype)) for p in params],
            anchors=[state.get("anchor") for state in states],
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            steps=[state["step"] for state in states],
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state, anchors included, and the groups' options without ``lora_pairs``."""
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            group.pop("lora_pairs", None)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore options, moments, steps and anchors from :meth:`state_dict`.

        Tensors that the optimizer already has are written in place, so that a captured step sees
        the loaded values. ``lora_pairs`` stay those of this optimizer.

        Args:
            state_dict: From an AnchoredAdamW with groups of the same sizes. Not written, and not
                shared with.

        Raises:
            ValueError: The groups differ, or the state holds no anchor where it should (that of
                another optimizer, say).
        """
        _check_saved(self.param_groups, state_dict)
        old_groups = list(self.param_groups)
        old_state = dict(self.state)
        super().load_state_dict(state_dict)
        saved_groups = state_dict["param_groups"]
        for group, old, saved in zip(self.param_groups, old_groups, saved_groups, strict=True):
            if "lora_pairs" in old:
                group["lora_pairs"] = old["lora_pairs"]
            for name in ("lr", "anchor_weight"):
                if isinstance(group[name], Tensor):
                    group[name] = _write_over(old[name], group[name], group[name].device)
            for param, number in zip(group["params"], saved["params"], strict=True):
                # Not torch's copies: they are cast to the parameter's dtype.
                self.state[param] = {
                    name: _write_over(old_state[param].get(name), value, param.device)
                    for name, value in state_dict["state"][number].items()
                }

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {
            name: self.__dict__[name]
            for name in ("max_grad_norm", "penalty", "grad_norm", "_default_anchor")
        }


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    anchors: Sequence[Tensor | None] | None = None,
    anchor_weight: float | Tensor = 0.0,
) -> None:
    """Make one step of AdamW in place, with the decoupled pull to ``anchors`` if given.

    t += 1,   m += (1 - beta1)(g - m),   v = beta2 v + (1 - beta2) g^2
    theta -= lr weight_decay theta + lr anchor_weight (theta - theta_0)
    theta -= lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Source: Decoupled Weight Decay Regularization (arXiv 1711.05101), Algorithm 2; the pull to the
    anchor is ours.

    Args:
        params: The theta, float32 or float64, on one device; written.
        grads: The g, of the dtypes of ``params``. Not written.
        exp_avgs: The m, of the dtypes of ``params``; written.
        exp_avg_sqs: The v, of the dtypes of ``params``; written.
        steps: The t, a 0-dim float32 tensor for each parameter, on its device; written.
        lr: Learning rate, a float or a 0-dim tensor.
        beta1: Decay rate of m, in [0, 1).
        beta2: Decay rate of v, in [0, 1).
        eps: Added to the root.
        weight_decay: AdamW's.
        anchors: The theta_0, of the shapes of ``params``; None entries are zeros. Not written.
        anchor_weight: Strength of the pull, a float or a 0-dim tensor.
    """
    if not params:
        return
    dtype, device = compute_dtype(params), params[0].device
    lr, anchor_weight = _beside(lr, device), _beside(anchor_weight, device)
    torch._foreach_add_(steps, 1)

    pulls: list[Tensor] = []
    if anchors is not None:
        pulls = [p if a is None else p - a for p, a in zip(params, anchors, strict=True)]
        pulls = [*torch._foreach_mul(pulls, lr * anchor_weight)]
    if weight_decay != 0:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    if pulls:
        torch._foreach_sub_(params, pulls)

    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)

    # Bias corrections 1 - beta^t for all parameters at once; expm1 keeps small t exact in float32.
    t = torch.stack(steps).to(dtype)
    correction1 = -torch.expm1(t * _log(beta1))
    correction2 = -torch.expm1(t * _log(beta2))
    denominators = [*torch._foreach_sqrt(exp_avg_sqs)]
    torch._foreach_div_(denominators, [*correction2.sqrt().unbind()])
    torch._foreach_add_(denominators, eps)
    torch._foreach_div_(denominators, [*(-lr / correction1).unbind()])
    torch._foreach_addcdiv_(params, exp_avgs, denominators)


@dataclass
class _Batch:
    """What a step works on: a group's parameters that have gradients, with these and their state.

    ``indices`` are those of the parameters in the group; ``grads`` are the parameters' own, or
    float32 copies of float16 and bfloat16 ones.
    """

    group: dict[str, Any]
    indices: list[int]
    params: list[Tensor]
    grads: list[Tensor]
    anchors: list[Tensor | None]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]


def _anchor_(batch: _Batch) -> Tensor | None:
    """Add the anchor's gradient to the batch's grads; return the penalty, None if there is none."""
    group = batch.group
    weight = group["anchor_weight"]
    if not batch.params or _is_off(weight):
        return None
    if group["anchor"] == "none":
        raise ValueError(
            "anchor_weight: was 0 when the group was added, so that no anchor was kept; "
            "give the group its weight (or a 0-dim tensor) when it is added"
        )
    weight = _beside(weight, batch.params[0].device)
    if group["form"] == "effective":
        return _anchor_pairs_(batch, weight)
    grads = batch.grads if group["form"] == "raw" else None
    return anchor_penalty_(batch.params, batch.anchors, grads, weight)


def _anchor_pairs_(batch: _Batch, weight: float | Tensor) -> Tensor | None:
    params = dict(zip(batch.indices, batch.params, strict=True))
    grads = dict(zip(batch.indices, batch.grads, strict=True))
    given = zip(batch.indices, batch.anchors, strict=True)
    anchors = {index: anchor for index, anchor in given if anchor is not None}
    pairs: list[Pair] = batch.group["lora_pairs"]
    pairs = [pair for pair in pairs if pair.down.param in params and pair.up.param in params]
    if not pairs:
        return None
    # B0 A0 is zero where either is.
    anchored = [pair.down.param in anchors and pair.up.param in anchors for pair in pairs]
    both = list(zip(pairs, anchored, strict=True))
    return lora_anchor_penalty_(
        [pair.down.of(params) for pair in pairs],
        [pair.up.of(params) for pair in pairs],
        [pair.scale for pair in pairs],
        [pair.down.of(grads) for pair in pairs],
        [pair.up.of(grads) for pair in pairs],
        weight,
        anchor_downs=[pair.down.of(anchors) if has else None for pair, has in both],
        anchor_ups=[pair.up.of(anchors) if has else None for pair, has in both],
    )


def _squared_norm(batch: _Batch) -> Tensor | None:
    """Return ||g||^2: the penalty of weight 1 to an anchor of zeros, which sums in chunks."""
    if not batch.grads:
        return None
    grads = [grad.contiguous() for grad in batch.grads]
    return apply_anchor_(grads, [None] * len(grads), None, 1.0)


def _update_(batch: _Batch) -> None:
    group = batch.group
    beta1, beta2 = group["betas"]
    decoupled = group["form"] == "decoupled" and not _is_off(group["anchor_weight"])
    params = [p.to(_wide(p.dtype)) for p in batch.params]
    adamw_(
        params,
        batch.grads,
        batch.exp_avgs,
        batch.exp_avg_sqs,
        batch.steps,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        anchors=batch.anchors if decoupled else None,
        anchor_weight=group["anchor_weight"],
    )
    for param, value in zip(batch.params, params, strict=True):
        if param.dtype != value.dtype:
            param.copy_(value)


def _total(values: Sequence[Tensor | None], device: torch.device) -> Tensor:
    given = [value.to(device) for value in values if value is not None]
    return torch.stack(given).sum() if given else torch.zeros((), device=device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is_off(weight: float | Tensor) -> bool:
    return not isinstance(weight, Tensor) and weight == 0


def _beside(value: float | Tensor, device: torch.device) -> float | Tensor:
    return value.to(device) if isinstance(value, Tensor) else value


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _share_out(params: ParamsT, anchor: Sequence[Tensor | None]) -> list[dict[str, Any]]:
    """Return the groups, each with its part of the list of anchors."""
    entries: list[Any] = list(params)
    groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    groups = [dict(group) for group in groups]
    start = 0
    for group in groups:
        given = group["params"]
        group["params"] = [given] if isinstance(given, Tensor) else list(given)
        end = start + len(group["params"])
        group.setdefault("anchor", list(anchor[start:end]))
        start = end
    if start != len(anchor):
        raise ValueError(
            f"anchor: got {len(anchor)} entries, want {start}, one for each parameter of all groups"
        )
    return groups


def _check_options(group: dict[str, Any]) -> None:
    """Raise ValueError for an option out of its range."""
    for name in ("lr", "eps", "weight_decay", "anchor_weight"):
        value = group[name]
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{name}: got {value}, want a number >= 0")
        if isinstance(value, Tensor) and (name in ("eps", "weight_decay") or value.dim() != 0):
            wanted = "a float" if name in ("eps", "weight_decay") else "a float or a 0-dim tensor"
            raise ValueError(f"{name}: got a tensor of shape {tuple(value.shape)}, want {wanted}")
    for index, beta in enumerate(group["betas"]):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{index}]: got {beta}, want a number in [0, 1)")
    if group["form"] not in FORMS:
        raise ValueError(f'form: got "{group["form"]}", want one of {", ".join(FORMS)}')
    params = group["params"]
    for index, param in enumerate(params):
        if not param.dtype.is_floating_point:
            raise ValueError(f"params[{index}]: got dtype {param.dtype}, want a floating-point one")
        if param.device != params[0].device:
            raise ValueError(
                f"params[{index}]: is on {param.device}, params[0] on {params[0].device}; "
                "put each device's parameters in a group of their own"
            )
        if not param.is_contiguous() and not _is_off(group["anchor_weight"]):
            raise ValueError(
                f"params[{index}]: got strides {param.stride()} for shape {tuple(param.shape)}, "
                f"want a contiguous parameter where anchor_weight is not 0"
            )


def _resolve_anchor(
    group: dict[str, Any], anchor: str | Sequence[Tensor | None]
) -> tuple[str, list[Tensor | None]]:
    """Return the kind of anchor that the state_dict names, and the group's anchors, as copies.

    The kinds: "start" and "list" keep tensors, "zero" does not, and "none" means that the weight
    was 0, so that nothing was kept.
    """
    params = group["params"]
    nothing: list[Tensor | None] = [None] * len(params)
    if isinstance(anchor, str) and anchor not in ANCHORS:
        raise ValueError(f'anchor: got "{anchor}", want one of {", ".join(ANCHORS)}, or a list')
    if not isinstance(anchor, str):
        _check_anchors(params, anchor)
    if _is_off(group["anchor_weight"]):
        return "none", nothing
    if anchor == "zero":
        return "zero", nothing
    values = params if isinstance(anchor, str) else anchor
    kept = [
        None if value is None else value.detach().to(param.device, copy=True).contiguous()
        for value, param in zip(values, params, strict=True)
    ]
    if group["form"] == "effective" and _are_products_zero(group["lora_pairs"], kept):
        return "zero", nothing
    return ("start" if isinstance(anchor, str) else "list"), kept


def _check_anchors(params: Sequence[Tensor], anchors: Sequence[Tensor | None]) -> None:
    if len(anchors) != len(params):
        raise ValueError(
            f"anchor: got {len(anchors)} entries, want {len(params)}, one for each parameter"
        )
    for index, (param, value) in enumerate(zip(params, anchors, strict=True)):
        if value is not None and (value.shape != param.shape or not value.dtype.is_floating_point):
            raise ValueError(
                f"anchor[{index}]: got shape {tuple(value.shape)} and dtype {value.dtype}, want "
                f"{tuple(param.shape)} and a floating-point dtype, as params[{index}]"
            )


def _are_products_zero(pairs: Sequence[Pair], anchors: Sequence[Tensor | None]) -> bool:
    """Say whether all ups, or all downs, are zero, so that B0 A0 is. Reads on the host."""
    given = {index: anchor for index, anchor in enumerate(anchors) if anchor is not None}

    def is_zero(place: Place) -> bool:
        return place.param not in given or not bool(place.of(given).any())

    return all(is_zero(pair.up) for pair in pairs) or all(is_zero(pair.down) for pair in pairs)


def _check_saved(groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Raise ValueError if the state_dict's anchors are not those that its groups speak of."""
    for index, saved in enumerate(state_dict["param_groups"]):
        where = f"param_groups[{index}]"
        if "anchor" not in saved:
            raise ValueError(
                f"{where}: the state_dict names no anchor, so it is not that of an AnchoredAdamW"
            )
        if (
            index < len(groups)
            and saved["form"] == "effective"
            and "lora_pairs" not in groups[index]
        ):
            raise ValueError(
                f'{where}: the saved form is "effective" and this group has no lora_pairs; '
                "make the optimizer with the form and the pairs that it was saved with"
            )
        for number in saved["params"]:
            state = state_dict["state"].get(number, {})
            missing = {"step", "exp_avg", "exp_avg_sq"} - state.keys()
            if saved["anchor"] == "start":
                missing |= {"anchor"} - state.keys()
            if missing:
                raise ValueError(
                    f"{where}: the state of parameter {number} lacks {', '.join(sorted(missing))}"
                )


def _write_over(old: object, new: Tensor, device: torch.device) -> Tensor:
    """Return a copy of ``new``, in the memory of ``old`` if that is a tensor of its kind."""
    if isinstance(old, Tensor) and (old.shape, old.dtype, old.device) == (
        new.shape,
        new.dtype,
        device,
    ):
        with torch.no_grad():
            return old.copy_(new)
    return new.detach().to(device, copy=True)
