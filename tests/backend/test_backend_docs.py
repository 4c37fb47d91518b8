"""docs/backend.md: its code runs, its flags are read, its links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import fastppt
from fastppt.backend import lora_pairs
from fastppt_kernels import AnchoredAdamW

DOCS = Path(__file__).parents[2] / "docs" / "backend.md"
ROWS = 2


def read_docs() -> tuple[list[str], dict[tuple[str, str], list[str]]]:
    """The headings, and the blocks of code by heading and language."""
    headings: list[str] = []
    found: dict[tuple[str, str], list[str]] = {}
    language, lines = "", []
    for line in DOCS.read_text().splitlines():
        if line.startswith("```") and not language:
            language, lines = line.removeprefix("```"), []
        elif line == "```":
            found.setdefault((headings[-1], language), []).append("\n".join(lines) + "\n")
            language = ""
        elif language:
            lines.append(line)
        elif line.startswith("#"):
            headings.append(line.lstrip("# "))
    return headings, found


HEADINGS, BLOCKS = read_docs()


def tiny_unet() -> UNet2DConditionModel:
    """A UNet as SDXL's in its conditions, with adapters of peft."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    ).requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets))
    return unet


def told(seed: int) -> dict[str, Any]:
    chance = torch.Generator().manual_seed(seed)
    added = {"text_embeds": torch.randn(ROWS, 8, generator=chance), "time_ids": torch.ones(ROWS, 6)}
    tokens = torch.randn(ROWS, 5, 8, generator=chance)
    return {"encoder_hidden_states": tokens, "added_cond_kwargs": added}


@contextmanager
def without_adapters(unet: nn.Module) -> Iterator[None]:
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    yield
    for layer in layers:
        layer._disable_adapters = False


def names_of_the_docs() -> dict[str, Any]:
    """What the text says is there, of a bare loop and of the trainers."""
    unet = tiny_unet()
    chance = torch.Generator().manual_seed(1)
    batches = [
        (
            torch.randn(ROWS, 4, 8, 8, generator=chance),
            torch.randn(ROWS, 4, 8, 8, generator=chance),
            torch.tensor([100, 700]),
        )
        for _ in range(2)
    ]
    params = [param for param in unet.parameters() if param.requires_grad]
    clean, noise, timesteps = batches[0]
    subject = told(2)
    # Of one photo; the script gives the UNet a row for each.
    add_time_ids = torch.ones(1, 6)
    args = Namespace(
        learning_rate=1e-3,
        adam_beta1=0.9,
        adam_beta2=0.99,
        adam_epsilon=1e-8,
        adam_weight_decay=1e-2,
        max_grad_norm=1.0,
        class_prompt="a photo of a dog",
    )
    return {
        "torch": torch,
        "fastppt": fastppt,
        "unet": unet,
        "scheduler": DDPMScheduler(),
        "batches": batches,
        "subject": subject,
        "plain": told(3),
        # diffusers' scripts
        "args": args,
        "unet_lora_parameters": params,
        "compute_text_embeddings": lambda *_: (torch.ones(1, 5, 8), torch.ones(1, 8)),
        "text_encoders": None,
        "tokenizers": None,
        "accelerator": Namespace(device="cpu"),
        "bsz": ROWS,
        "add_time_ids": add_time_ids,
        "noisy_model_input": clean,
        "timesteps": timesteps,
        "target": noise,
        "prompt_embeds_input": subject["encoder_hidden_states"],
        "unet_added_conditions": subject["added_cond_kwargs"]
        | {"time_ids": add_time_ids.repeat(ROWS, 1)},
        # SimpleTuner
        "optimizer_choices": {},
        # OneTrainer
        "parameters": params,
        "config": Namespace(learning_rate=1e-3, clip_grad_norm=1.0),
        "optimizer_config": Namespace(weight_decay=None),
        "model": Namespace(unet=unet),
        "self": Namespace(
            model_setup=Namespace(prior_model=lambda model, _: without_adapters(model.unet))
        ),
        # ai-toolkit
        "lower_type": "anchoredadamw",
        "params": params,
        "learning_rate": "1e-3",
        "optimizer_params": {"anchor_weight": 0.001},
    }


def run_blocks(heading: str) -> dict[str, Any]:
    names = names_of_the_docs()
    for code in BLOCKS[heading, "python"]:
        exec(compile(code, f"{DOCS}: {heading}", "exec"), names)
    return names


def ups(unet: nn.Module) -> Tensor:
    return torch.cat([up.flatten() for _, up, _ in lora_pairs(unet)])


@pytest.mark.parametrize("heading", ["The anchor", "Alignment", "A captured step"])
def test_a_loop_of_the_docs_trains(heading: str) -> None:
    names = run_blocks(heading)
    assert ups(names["unet"]).abs().max() > 1e-5


def test_the_anchor_of_the_docs_is_taken_of_the_pairs() -> None:
    optimizer = run_blocks("The anchor")["optimizer"]
    assert optimizer.param_groups[0]["form"] == "effective"
    assert optimizer.penalty > 0


def test_the_indicator_of_the_docs_has_seen_the_losses() -> None:
    gammas = run_blocks("The indicator")["indicator"].gamma_by_bin()
    assert gammas.isnan().tolist() == [bin not in (1, 7) for bin in range(10)]


def test_the_lines_for_the_scripts_of_diffusers_make_one_loss() -> None:
    names = run_blocks("diffusers' scripts")
    names["loss"].backward()
    names["optimizer"].step()
    assert ups(names["unet"]).abs().max() > 1e-5
    assert names["optimizer"].defaults["betas"] == (0.9, 0.99)


def test_class_prompts_are_encoded_before_the_scripts_delete_their_text_encoders() -> None:
    _, before_deleting, after_prepare, in_loop = BLOCKS["diffusers' scripts", "python"]
    assert "text_encoders, tokenizers" in before_deleting
    assert "attach(" not in before_deleting
    assert not re.search("text_encoders|tokenizers", after_prepare + in_loop)


def test_the_flags_for_sd_scripts_are_options() -> None:
    (code,) = BLOCKS["sd-scripts", "bash"]
    words = shlex.split(code.replace("\\\n", " "))
    module, _, name = words[words.index("--optimizer_type") + 1].rpartition(".")
    start, end = words.index("--optimizer_args") + 1, words.index("--max_grad_norm")
    pairs = (word.split("=") for word in words[start:end])
    options = {key: ast.literal_eval(value) for key, value in pairs}
    assert options["anchor"] == "first_step"
    made = getattr(importlib.import_module(module), name)
    optimizer = made([nn.Parameter(torch.ones(3))], lr=1e-3, **options)
    assert {key: optimizer.param_groups[0][key] for key in ("anchor_weight", "form")} == {
        "anchor_weight": 1e-3,
        "form": "raw",
    }
    assert optimizer.max_grad_norm == 1.0


def test_the_file_for_sd_scripts_finds_the_pairs_of_its_modules() -> None:
    """As its networks list them: a dictionary's values, each module's down before its up."""
    shapes = [(2, 5), (7, 2), (2, 4), (3, 2)]
    weights = {number: nn.Parameter(torch.randn(shape)) for number, shape in enumerate(shapes)}
    start = [param.detach().clone() for param in weights.values()]
    make = run_blocks("sd-scripts")["AnchoredLora"]
    optimizer = make([{"params": weights.values()}], alpha=3, lr=1e-3, anchor_weight=0.5)
    for param in weights.values():
        param.data.mul_(1.5)
        param.grad = torch.zeros_like(param)
    optimizer.step()
    # The scale is alpha / rank, and the product of what is 1.5 times as large 2.25 times.
    moved = [1.25 * 1.5 * up @ down for down, up in zip(start[::2], start[1::2], strict=True)]
    wanted = 0.5 * sum(change.square().sum() for change in moved)
    torch.testing.assert_close(optimizer.penalty, wanted)


def test_the_entry_for_simpletuner_makes_an_optimizer() -> None:
    names = run_blocks("SimpleTuner")
    (entry,) = names["optimizer_choices"].values()
    optimizer = entry["class"](names["params"], lr=1e-3, **entry["default_settings"])
    assert optimizer.param_groups[0]["anchor_weight"] == 1e-3
    assert optimizer.param_groups[0]["anchor"] == "first_step"


def test_the_lines_for_onetrainer_work_with_its_switch() -> None:
    names = run_blocks("OneTrainer")
    optimizer, attached, unet = names["optimizer"], names["attached"], names["unet"]
    for _, up, _ in lora_pairs(unet):
        up.data.normal_()
    clean, _, timesteps = names["batches"][0]
    with attached.base():
        base = unet(clean, timesteps, **names["subject"]).sample
    tuned = unet(clean, timesteps, **names["subject"]).sample
    attached.losses().total.backward()
    optimizer.step()
    assert (base - tuned).abs().max() > 1e-3
    assert optimizer.penalty > 0


def test_the_branch_for_ai_toolkit_makes_an_optimizer() -> None:
    optimizer = run_blocks("ai-toolkit")["optimizer"]
    assert isinstance(optimizer, AnchoredAdamW)
    assert optimizer.param_groups[0]["anchor_weight"] == 1e-3


def test_every_block_of_code_is_run_here() -> None:
    run = {"The anchor", "Alignment", "The indicator", "A captured step"}
    run |= {"diffusers' scripts", "sd-scripts", "SimpleTuner", "OneTrainer", "ai-toolkit"}
    assert {heading for heading, language in BLOCKS if language == "python"} == run
    assert {language for _, language in BLOCKS} == {"python", "bash"}


def slug(heading: str) -> str:
    """The anchor that a page has for a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_lead_to_headings_and_files() -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", DOCS.read_text())
    assert len(targets) > 15
    for target in targets:
        if target.startswith("https://arxiv.org/abs/"):
            continue
        path, _, anchor = target.partition("#")
        file = (DOCS.parent / path).resolve() if path else DOCS
        assert file.is_file(), target
        if anchor:
            lines = file.read_text().splitlines()
            assert anchor in {slug(line.lstrip("# ")) for line in lines if line.startswith("#")}
