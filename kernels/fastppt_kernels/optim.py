"""AdamW with an anchor and a gradient clip in one step."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fastppt_kernels.anchored_adamw import Batch, Launcher, anchored_adamw_
from fastppt_kernels.anchored_adamw.batch import wide_dtype
from fastppt_kernels.lora_anchor_penalty.op import LoraAnchor
from fastppt_kernels.lora_pairs import Pair
from fastppt_kernels.optim_groups import (
    NUM_SEEDS,
    check_limit,
    check_options,
    find_gradients,
    is_off,
    resolve_anchor,
    resolve_copies,
    resolve_pairs,
    share_out,
)
from fastppt_kernels.optim_settle import settle, settle_replaced, states_of
from fastppt_kernels.optim_sharded import check_sharded, has_shards, sharded_step_
from fastppt_kernels.optim_state import check_saved, keep_places, make_state, take_over

# What a group holds for this optimizer's parameters alone: neither saved nor loaded.
NOT_SAVED = ("lora_pairs", "working_copy", "anchor_storage")


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
            ``anchor_weight``, ``form``, ``anchor``, and the last four. A group of form "effective"
            also holds ``lora_pairs``, a list of (down, up, scale): down [rank, in] and up [out,
            rank] are parameters of the group or contiguous views into them, looked up once, here.
            A group may hold ``working_copy``: one tensor (or None) for each parameter, or one for
            a single parameter, of its shape, strides and device and any floating-point dtype
            (bfloat16, say). It is kept equal to the parameter, rounded: written here, and by each
            step in the pass that writes the parameter.
            A group with ``share_anchor=True`` reads the tensors of its list ``anchor`` where they
            are, of any floating-point dtypes, instead of keeping copies.
        lr: Learning rate, a float or a 0-dim tensor (on the parameters' device, if the step is
            captured in a CUDA graph; changed in place it then acts on the replays).
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: AdamW's, decoupled.
        anchor_weight: Factor of the penalty, a float or a 0-dim tensor on the parameters' device.
            The float 0 does no work and keeps no anchor.
        anchor: "start": the values at the time when the group is added, kept as
            ``state[p]["anchor"]``. "first_step": those that the first step finds, where weights
            are loaded, cast or sharded after the optimizer is made; that step reads on the host.
            "zero": nothing is kept or read. A list: one tensor, or None for zeros, for each
            parameter over all groups in order (for each of the group's, where a group gives it).
            Anchors that are all zero are not kept; for form "effective" nor are those of parameters
            whose pairs all have B0 A0 = 0 (a new LoRA, whose ups are zero).
        form: "raw", "effective" or "decoupled".
        max_grad_norm: The largest norm, over all groups; None: no clip.
        anchor_storage: "device", or "host": anchors are kept in host memory, pinned where the
            parameters are on a GPU, and each step brings them in pieces of 16 MiB, twice, beside
            the kernels of the pieces before. The same results, bit for bit. Not for "effective".
        moments: "fp32", or "8bit": each moment is kept as a byte an element and a float32 scale a
            block of 256 (arXiv 2110.02861; the map of torchao and bitsandbytes). A step works in
            float32 on a piece at a time. Blocks follow the parameter's memory.
        rounding: "nearest", or "stochastic": a float16 or bfloat16 parameter is rounded up or down
            at random, so that its mean is the float32 value and small updates are not lost. The
            random bits are a function of ``seed``, the group's number, the step count and the
            element: a resumed run has the same.
        seed: Of that rounding, an integer >= 0; counts modulo 2^31.

    Attributes:
        penalty: 0-dim device tensor, the sum of the groups' penalties at the last step, of the
            values before it. For "decoupled" too: anchor_weight sum ||theta - theta_0||^2.
        grad_norm: 0-dim device tensor, the norm of step 2 before the clip.
        skipped: 0-dim bool device tensor: the last step was asked to skip, or found its norm not
            finite, and left all as it was.

    Raises:
        ValueError: An option out of its range; an anchor of another shape or of too few entries;
            "effective" without ``lora_pairs``, with a pair that lies in no parameter of the group
            or a parameter that no pair lies in (named by their indices); "stochastic" with a wider
            parameter or a working copy, "8bit" with a float64 one; an anchor to share that is not
            where ``anchor_storage`` says.

    A parameter without a gradient is left out, as in torch; so is a pair without both gradients.
    A step reads nothing on the host, and on a GPU can be captured in a CUDA graph once it has
    been taken before, with gradients that stay in place (``zero_grad(set_to_none=False)``).
    Float options are kept on the device; a step that finds one changed rewrites it there, but a
    replay does not look, so what is to change between replays is given as a tensor. State is made
    with the group, or with anchor "first_step" by that step. Anchors are part of the state_dict, or
    a resumed run would be held at the values it resumed from; ``load_state_dict`` writes into the
    state's tensors where they are. What ``.grad`` holds after a step is not part of the contract.

    In other trainers: parameters that were moved to another device take their state along at the
    next step. A step raises ValueError for what would be silently wrong: parameters cast to or from
    float64, of another shape, or in the place of others whose anchors were kept; and in one of
    several processes for those that were changed between being given and the first step, where the
    anchor is "start" (DistributedDataParallel gives all processes the first one's values): make
    the optimizer after the wrap, or take "first_step". A clip outside does not see the anchor;
    ``max_grad_norm`` does. A GradScaler unscales before the step, and leaves it out where gradients
    are not finite. ``torch.compile`` leaves it as it is. DTensors (``fully_shard``) are worked on
    where they lie, with penalty and norm of the whole; "effective", "8bit", "stochastic", "host"
    and working copies are refused for them.

    Launches on a GPU: two for each group (two for each piece of anchors from the host) and one for
    all, whatever the number of tensors, after those of the effective form's penalty. Float64, and
    parameters on several devices, take plain PyTorch, as the CPU does.

    Rounding: float16 and bfloat16 parameters have float32 moments; their gradients are widened
    first, and the new value is rounded once. A gradient may be of another floating-point dtype than
    its parameter (``Tensor.grad_dtype``).
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
        anchor_storage: str = "device",
        moments: str = "fp32",
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        check_limit(max_grad_norm)
        self.max_grad_norm = max_grad_norm
        self.penalty = self.grad_norm = torch.zeros(())
        self.skipped = torch.zeros((), dtype=torch.bool)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "anchor_weight": anchor_weight,
            "form": form,
            "anchor_storage": anchor_storage,
            "moments": moments,
            "rounding": rounding,
            "seed": seed,
        }
        self._launcher = Launcher()
        self._default_anchor: str = "start"
        if isinstance(anchor, str):
            self._default_anchor = anchor
            super().__init__(params, defaults)
        else:
            super().__init__(share_out(params, anchor), defaults)

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
        copies = param_group.pop("working_copy", None)
        share = param_group.pop("share_anchor", False)
        super().add_param_group(param_group)
        # torch normalises the group and appends it; a group that we then refuse goes again.
        group = self.param_groups.pop()
        check_options(group)
        check_sharded(group, anchor, copies)
        places = resolve_pairs(group, pairs)
        if places is not None:
            group["lora_pairs"] = places
        if copies is not None:
            group["working_copy"] = resolve_copies(group, copies)
        group["anchor"], anchors = resolve_anchor(group, anchor, share)
        if group["anchor"] != "first_step":
            for param, value in zip(group["params"], anchors, strict=True):
                self.state[param] = make_state(param, value, group["moments"])
        self.param_groups.append(group)
        self.refresh_working_copies()

    def refresh_working_copies(self) -> None:
        """Write the parameters into their working copies: after they were changed by hand."""
        with torch.no_grad():
            for group in self.param_groups:
                for param, copy in zip(
                    group["params"], group.get("working_copy", ()), strict=False
                ):
                    if copy is not None:
                        copy.copy_(param)

    @_disable_dynamo
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        skip: Tensor | None = None,
        skip_non_finite: bool = False,
    ) -> float | None:
        """Take one step; see the class for its equations.

        Args:
            closure: Computes the loss anew and returns it.
            skip: 0-dim bool, integer or float tensor on the parameters' device. Where it is not
                0 the step leaves parameters, moments, step counts and working copies as they are
                (whatever the gradients hold), and still gives ``penalty`` and ``grad_norm``.
                It is read on the device, so a captured step sees its new values.
            skip_non_finite: Skip the step where ``grad_norm`` is NaN or infinite: the norm of all
                groups, the coupled anchor's gradient included, with or without a clip. That takes
                in finite gradients of which the sum of squares exceeds float32 (float64 for
                float64 parameters). It is decided on the device, by the launch that computes the
                norm. ``skipped`` says what was decided; ``.grad`` may hold NaN afterwards, even
                where it held none.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            ValueError: A sparse gradient; under CUDA graph capture, a parameter without a gradient
                (named by its index): the graph would leave it out for good, or a first step that is
                to take the anchors; parameters that are no more those that the group was added
                with, see the class.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            penalties, batches = [], []
            for number, group in enumerate(self.param_groups):
                if group["anchor"] == "first_step":
                    settle(number, self.param_groups, self.state)
                indices = find_gradients(number, group)
                if not indices:
                    continue
                batch = self._gather(number, indices)
                if group["form"] == "effective" and not is_off(group["anchor_weight"]):
                    penalties += self._pull_pairs_(number, indices, batch)
                batches.append(batch)
            if batches:
                take_step = sharded_step_ if has_shards(batches) else anchored_adamw_
                self.penalty, self.grad_norm, self.skipped = take_step(
                    batches,
                    self.max_grad_norm,
                    extra_penalties=penalties,
                    skip=skip,
                    skip_non_finite=skip_non_finite,
                    launcher=self._launcher,
                )
            else:
                self.penalty = self.grad_norm = torch.zeros((), device=self._device())
                self.skipped = torch.zeros((), dtype=torch.bool, device=self._device())
        return loss

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or fill them with zeros, as ``torch.optim.Optimizer`` does."""
        if set_to_none:
            self._launcher.forget()
        super().zero_grad(set_to_none)

    def _gather(self, number: int, indices: Sequence[int]) -> Batch:
        """Return the parameters of ``indices`` of the group, with what a step needs of them."""
        group = self.param_groups[number]
        params = [group["params"][i] for i in indices]
        states = states_of(number, params, self.param_groups, self.state)
        form, weight = group["form"], group["anchor_weight"]
        if not is_off(weight) and group["anchor"] == "none":
            raise ValueError(
                "anchor_weight: was 0 when the group was added, so that no anchor was kept; "
                "give the group its weight (or a 0-dim tensor) when it is added"
            )
        grads = [p.grad for p in params]
        if form == "effective":
            # The pull to the anchor is added to them, and is not to be rounded to bfloat16.
            grads = [
                self._launcher.widen(number, index, grad, wide_dtype(param.dtype))
                for index, grad, param in zip(indices, grads, params, strict=True)
            ]
        copies = group.get("working_copy")
        has_codes, rounds = group["moments"] == "8bit", group["rounding"] == "stochastic"
        return Batch(
            params=params,
            grads=grads,
            anchors=[state.get("anchor") for state in states],
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            steps=[state["step"] for state in states],
            copies=[None if copies is None else copies[i] for i in indices],
            form="none" if form == "effective" or is_off(weight) else form,
            lr=group["lr"],
            anchor_weight=weight,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            exp_avg_scales=[s["exp_avg_scale"] for s in states] if has_codes else None,
            exp_avg_sq_scales=[s["exp_avg_sq_scale"] for s in states] if has_codes else None,
            host_anchors=group["anchor_storage"] == "host",
            rounding_seed=(group["seed"] + number) % NUM_SEEDS if rounds else None,
        )

    def _pull_pairs_(self, number: int, indices: Sequence[int], batch: Batch) -> list[Tensor]:
        """Add the effective form's gradient to the batch's; return the penalty, if there is one."""
        tensors = [*batch.params, *batch.grads, *(t for t in batch.anchors if t is not None)]
        make = partial(_pair_up, self.param_groups[number], indices, batch)
        pairs = self._launcher.recall(number, tensors, make)
        if pairs is None:
            return []
        weight = batch.anchor_weight
        if isinstance(weight, Tensor):
            weight = weight.to(batch.params[0].device)
        return [pairs.pull_(weight)]

    def _device(self) -> torch.device:
        every = (p for group in self.param_groups for p in group["params"])
        return next((p.device for p in every), torch.device("cpu"))

    def state_dict(self) -> dict[str, Any]:
        """Return the state, anchors included, and the groups' options.

        Without ``lora_pairs``, ``working_copy`` and ``anchor_storage``, which belong to this
        optimizer's parameters.
        """
        settle_replaced(self.param_groups, self.state)
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            for name in NOT_SAVED:
                group.pop(name, None)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore options, moments, steps and anchors from :meth:`state_dict`.

        Tensors that the optimizer already has are written in place, so that a captured step sees
        the loaded values; anchors that are shared, too. ``lora_pairs``, ``working_copy`` and
        ``anchor_storage`` stay those of this optimizer; the working copies are written from the
        parameters, so load these first.

        Args:
            state_dict: From an AnchoredAdamW with groups of the same sizes. Not written, and not
                shared with.

        Raises:
            ValueError: The groups or the shapes differ (the state of another network), or how
                moments are kept; the state is that of another optimizer, or holds no anchor where
                it should.
        """
        check_saved(self.param_groups, state_dict)
        old_groups = list(self.param_groups)
        old_state = dict(self.state)
        # torch would make copies of the state, cast to the parameter's dtype, on its device.
        super().load_state_dict(state_dict | {"state": {}})
        saved_groups = state_dict["param_groups"]
        for group, old, saved in zip(self.param_groups, old_groups, saved_groups, strict=True):
            group |= {name: old[name] for name in NOT_SAVED if name in old}
            keep_places(group, old)
            for param, number in zip(group["params"], saved["params"], strict=True):
                # None for a parameter whose anchor the first step is to take.
                if values := state_dict["state"].get(number):
                    held = old_state.get(param, {})
                    self.state[param] = take_over(held, values, param, group)
        self.refresh_working_copies()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {
            name: self.__dict__[name]
            for name in ("max_grad_norm", "penalty", "grad_norm", "skipped", "_default_anchor")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch loads state through here too, and captured steps read what the launcher keeps.
        self.__dict__.setdefault("_launcher", Launcher())


def _pair_up(group: dict[str, Any], indices: Sequence[int], batch: Batch) -> LoraAnchor | None:
    """Return the batch's pairs, to be pulled to their anchors; None where it has no pair."""
    params = dict(zip(indices, batch.params, strict=True))
    grads = dict(zip(indices, batch.grads, strict=True))
    given = zip(indices, batch.anchors, strict=True)
    anchors = {index: anchor for index, anchor in given if anchor is not None}
    pairs: list[Pair] = group["lora_pairs"]
    pairs = [pair for pair in pairs if pair.down.param in params and pair.up.param in params]
    if not pairs:
        return None
    # B0 A0 is zero where either is.
    anchored = [pair.down.param in anchors and pair.up.param in anchors for pair in pairs]
    both = list(zip(pairs, anchored, strict=True))
    return LoraAnchor(
        [pair.down.of(params) for pair in pairs],
        [pair.up.of(params) for pair in pairs],
        [pair.scale for pair in pairs],
        [pair.down.of(grads) for pair in pairs],
        [pair.up.of(grads) for pair in pairs],
        [pair.down.of(anchors) if has else None for pair, has in both],
        [pair.up.of(anchors) if has else None for pair, has in both],
    )
