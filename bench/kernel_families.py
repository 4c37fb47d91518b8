"""Where the time of a step goes, by families of kernels: a summary of torch's profiler."""

import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.rows import Row

Call = Callable[[], object]

PRODUCTS = "products and convolutions"
ATTENTION = "attention"
POINTWISE = "norms and pointwise"
UPDATE = "optimizer and anchor"
ALIGNMENT = "alignment and indicator"
COPIES = "copies"
OTHER = "other"
# What lies between operators: Python, the dispatcher, and on a GPU waiting for either.
BETWEEN = "between kernels"
# Names that a report lists, and their letters: those of templates go on for pages.
LARGEST, NAME_LENGTH = 12, 120
FAMILIES = (PRODUCTS, ATTENTION, POINTWISE, UPDATE, ALIGNMENT, COPIES, OTHER, BETWEEN)

# The first that is found in the name of a GPU's kernel decides. Ours are called after their files.
GPU_PATTERNS = (
    (UPDATE, r"^(anchor_penalty|weighted_sum|anchored_adamw|lora_(gram|reduce|apply))_?"),
    (ALIGNMENT, r"^(attention_(logsumexp|map|difference|sum_splits)|feature_|denoising_)"),
    # Inductor's are called after all that it fused, the products' neighbours and casts included.
    (COPIES, r"^triton_poi_fused_(_to_copy|clone|copy_?|cat)_\d+"),
    (POINTWISE, r"^triton_(poi|red|per|for|mix)_"),
    (ATTENTION, r"flash|fmha|sdpa|attention|softmax"),
    (COPIES, r"^mem(cpy|set)|copy|catarray|nchwtonhwc|nhwctonchw|transpose|fillfunctor"),
    (
        PRODUCTS,
        r"gemm|gemv|cutlass|cublas|nvjet|xmma|conv|wgrad|dgrad|fprop|splitk|winograd|triton_tem|"
        r"dot_kernel",
    ),
    (UPDATE, r"multi_tensor|adam"),
    (
        POINTWISE,
        r"norm|moments|fusedparams|internalgradients|gammabeta|elementwise|reduce|silu|gelu|"
        r"upsample|index|gather|distribution|scan|vectorized",
    ),
)
# Likewise of an operator of torch on the CPU.
CPU_PATTERNS = (
    # Views and allocations compute nothing: what they take is the dispatcher's.
    (
        OTHER,
        r"^aten::(_?(un)?safe_view|view|_?reshape|as_strided|t$|transpose|permute|(un)?squeeze|"
        r"expand|slice|select|narrow|split|chunk|unbind|detach|alias|empty|resize|resolve_|"
        r"result_type|is_|lift|item|_local_scalar|flatten|movedim|swap)",
    ),
    (ATTENTION, r"^(aten|fastppt_kernels)::.*(attention|softmax)"),
    (PRODUCTS, r"^(aten|mkl\w*)::.*(mm|mv|dot|(?<!bi)(?<!tri)linear|conv|einsum|matmul)"),
    (COPIES, r"^aten::(copy_|clone|contiguous|to$|_to_copy|cat|stack|fill_|zero|full)"),
    (POINTWISE, r"^aten::"),
)
# What runs inside of these is of their family, whatever it is. Statistics of the base's pass are
# not seen, for they have no name without a gradient: they count as what they are made of.
CPU_SCOPES = (
    (UPDATE, r"^Optimizer\."),
    (ALIGNMENT, r"^(Direct__(alignment|loss)|_AlignFeatures)"),
    (ALIGNMENT, r"^fastppt_kernels::(attention_(map|alignment)|feature_|adaptive_)"),
    (ATTENTION, r"^Direct__attention"),
)


def family_of_kernel(name: str) -> str:
    """Return the family of a GPU's kernel, copy or fill."""
    return _match(name, GPU_PATTERNS, re.IGNORECASE)


def family_of_operator(name: str, scopes: Sequence[str]) -> str:
    """Return the family of an operator on the CPU.

    Args:
        name: The profiler's.
        scopes: Names of what it runs in, the nearest first.
    """
    for scope in (name, *scopes):
        found = _match(scope, CPU_SCOPES)
        if found != OTHER:
            return found
    return _match(name, CPU_PATTERNS)


def _match(name: str, patterns: Iterable[tuple[str, str]], flags: int = 0) -> str:
    return next((family for family, p in patterns if re.search(p, name, flags)), OTHER)


def profile_steps(step: Call, device: str, num_steps: int) -> Row:
    """Return where the time of a step goes: seconds by family, and the largest kernels.

    On the CPU the time of an operator without those that it calls; on a GPU that of its kernels,
    be the step captured or not. A profile of each step, and medians over them: what interrupts one
    step is no kernel's. On the CPU the profiler itself makes steps longer, those of many small
    operators most: shares are what it is for.

    Args:
        step: Takes one; has taken some before.
        device: "cpu" or "cuda".
        num_steps: How many are profiled.
    """
    look = _profile_on_gpu if device == "cuda" else _profile_on_cpu
    seen = [look(step) for _ in range(num_steps)]
    whole = statistics.median(seconds for seconds, _ in seen)
    kernels = [kernels for _, kernels in seen]
    families = [_by_family(each) for each in kernels]
    rows = []
    for family in FAMILIES[:-1]:
        taken = statistics.median(each[family][0] for each in families)
        rows.append({"family": family, "s": taken, "calls": families[0][family][1]})
    between = max(whole - sum(row["s"] for row in rows), 0.0)
    rows.append({"family": BETWEEN, "s": between, "calls": None})
    return {
        "profiled step s": whole,
        "steps": num_steps,
        "families": [row | {"share": row["s"] / whole} for row in rows],
        "top": _largest(kernels, whole),
    }


@dataclass(frozen=True)
class Kernel:
    """What ran under one name: kernels on a GPU, operators on the CPU."""

    name: str
    family: str
    seconds: float


def _profile_on_cpu(step: Call) -> tuple[float, list[Kernel]]:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
    kernels = []
    for event in profiled.events():
        family = family_of_operator(event.name, [*_scopes(event)])
        kernels.append(Kernel(event.name, family, event.self_cpu_time_total / 1e6))
    return seconds, kernels


def _scopes(event: Any) -> Iterator[str]:
    """Yield the names of what an event of the profiler runs in, the nearest first."""
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event.name


def _profile_on_gpu(step: Call) -> tuple[float, list[Kernel]]:
    # Torch's own operators would only make the many events more.
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    kernels, spans = [], []
    for event in profiled.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            spans.append((event.time_range.start, event.time_range.end))
            seconds = event.time_range.elapsed_us() / 1e6
            kernels.append(Kernel(event.name, family_of_kernel(event.name), seconds))
    start, end = min(start for start, _ in spans), max(end for _, end in spans)
    return (end - start) / 1e6, kernels


def _by_family(kernels: Iterable[Kernel]) -> dict[str, tuple[float, int]]:
    sums = dict.fromkeys(FAMILIES, (0.0, 0))
    for kernel in kernels:
        seconds, calls = sums[kernel.family]
        sums[kernel.family] = seconds + kernel.seconds, calls + 1
    return sums


def _largest(profiles: Sequence[Sequence[Kernel]], whole: float) -> list[Row]:
    """Return the names that take longest, by the median over the profiles."""
    names = {(kernel.name, kernel.family) for each in profiles for kernel in each}
    taken: dict[tuple[str, str], list[float]] = {name: [] for name in names}
    for kernels in profiles:
        sums: dict[tuple[str, str], float] = defaultdict(float)
        for kernel in kernels:
            sums[kernel.name, kernel.family] += kernel.seconds
        for name in names:
            taken[name].append(sums[name])
    calls = Counter((kernel.name, kernel.family) for kernel in profiles[0])
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    order = sorted(medians, key=lambda name: (-medians[name], name))[:LARGEST]
    return [
        {"name": name[:NAME_LENGTH], "family": family, "s": medians[name, family]}
        | {"share": medians[name, family] / whole, "calls": calls[name, family]}
        for name, family in order
    ]
