"""AnchoredAdamW under transformers' Trainer, given as an optimizer and as a class."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from fastppt_kernels import AnchoredAdamW

OPTIONS = {"lr": 1e-2, "weight_decay": 0.01, "anchor_weight": 0.5, "max_grad_norm": 0.3}
NUM_STEPS = 6


class Network(torch.nn.Module):
    """Returns its loss, as the Trainer wants it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(5, 7)
        self.norm = torch.nn.LayerNorm(7)

    def forward(self, inputs, labels):
        predicted = self.norm(torch.tanh(self.first(inputs)))
        return {"loss": (predicted - labels).square().mean(), "logits": predicted}


class Examples(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(2 * NUM_STEPS, 5, generator=generator)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return {"inputs": self.inputs[index], "labels": torch.ones(7)}


def make_trainer(folder, way, max_steps=NUM_STEPS):
    net = Network()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=2,
        learning_rate=OPTIONS["lr"],
        weight_decay=OPTIONS["weight_decay"],
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_steps=3,
        seed=7,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    given = {"optimizers": (AnchoredAdamW(net.parameters(), **OPTIONS), None)}
    if way == "class":
        given = {"optimizer_cls_and_kwargs": (AnchoredAdamW, OPTIONS)}
    return net, Trainer(model=net, args=arguments, train_dataset=Examples(), **given)


def optimizer_of(trainer):
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def values_of(net):
    return [p.detach().clone() for p in net.parameters()]


def train_plainly(trainer, groups, net):
    optimizer = AnchoredAdamW(groups, **OPTIONS)
    for batch in trainer.get_train_dataloader():
        net(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("way", ["object", pytest.param("class", marks=pytest.mark.slow)])
def test_the_trainer_steps_as_a_plain_loop_and_resumes_to_the_same_bits(way, tmp_path):
    net, trainer = make_trainer(tmp_path, way)
    trainer.train()
    optimizer = optimizer_of(trainer)
    assert isinstance(optimizer, AnchoredAdamW)
    assert optimizer.penalty > 0

    resumed, other = make_trainer(tmp_path, way)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(map(torch.equal, values_of(net), values_of(resumed)))
    assert torch.equal(optimizer_of(other).penalty, optimizer.penalty)
    starts = {n: p.detach() for n, p in Network().named_parameters()}
    for name, param in resumed.named_parameters():
        if starts[name].any():
            assert torch.equal(optimizer_of(other).state[param]["anchor"], starts[name])

    plain, third = make_trainer(tmp_path / "plain", way)
    names = {id(p): n for n, p in net.named_parameters()}
    by_name = dict(plain.named_parameters())
    groups = [
        {"params": [by_name[names[id(p)]] for p in g["params"]], "weight_decay": g["weight_decay"]}
        for g in optimizer.param_groups
    ]
    torch.manual_seed(7)
    train_plainly(third, groups, plain)
    assert all(map(torch.equal, values_of(net), values_of(plain)))
