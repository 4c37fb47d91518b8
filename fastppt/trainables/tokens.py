"""Embeddings of a new word (Textual Inversion, Gal et al., arXiv 2208.01618).

Shape legend: B batch, K text tokens, D text width, n vectors of the word.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastppt.errors import UserError
from fastppt.families.text_encoders import TextEncoders
from fastppt.trainables.arena import ParameterArena
from fastppt.trainables.joint_lora import add_product_


class LearnedTokens:
    """The rows of a new word in the embedding tables of the text encoders, in one arena.

    The tables themselves stay as they are: new ids are looked up here. The rows start as those of
    other words, one by one where these are as many tokens as there are vectors, else each as their
    mean (our choice).

    Args:
        text: The text encoders; they and their tokenizers learn the word.
        word: The new word, such as ``<v>``.
        vectors: n, the embeddings that it is made of.
        init: Words to start from; None leaves the rows zero, for `load`.
        device: Where values and gradients live.
        dtype: Of values and gradients; float32 unless arithmetic is being checked.
        key: The trainable's table in the configuration, for messages.

    Attributes:
        word: As given.
        words: One name a vector, the word itself first: those that diffusers gives them.
        init: As given.
        rows: [n, D] by component of the pipeline, the trained values; row i is of ``words[i]``.
        arena: The flat buffers that hold them.

    Raises:
        UserError: the model knows the word already, or reads nothing of ``init``.
    """

    def __init__(
        self,
        text: TextEncoders,
        word: str,
        *,
        vectors: int,
        init: str | None = None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        key: str = "stage.0.trainables.tokens",
    ) -> None:
        self.word, self.init = word, init
        self.words = (word, *(f"{word}_{number}" for number in range(1, vectors)))
        text.check_new_words(self.words)
        tables = {component: text.table(component).weight for component in text.clips}
        starts = {} if init is None else _starts(text, init, vectors, key)
        shapes = [(vectors, table.shape[1]) for table in tables.values()]
        working_dtype = next(iter(tables.values())).dtype
        self.arena = ParameterArena(shapes, device, dtype, working_dtype)
        self.rows = {
            name: tensor.detach() for name, tensor in zip(tables, self.arena.tensors, strict=True)
        }
        for name, start in starts.items():
            self.rows[name].copy_(start)
        self.refresh()
        self._norms = [rows.norm(dim=1, keepdim=True) for rows in self.rows.values()]
        parts = zip(tables, self.arena.tensors, self.arena.working, strict=True)
        text.add_words(
            self.words,
            {
                name: _LearnedRows(tensor, working, self.arena.flat)
                for name, tensor, working in parts
            },
        )

    @property
    def arenas(self) -> dict[str, ParameterArena]:
        """The one arena."""
        return {"": self.arena}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All trained values, views of the arena, by component and word."""
        return {f"{component}.{self.word}": rows for component, rows in self.rows.items()}

    def base(self) -> AbstractContextManager[None]:
        """Do nothing: the base is never asked with the new word."""
        return nullcontext()

    @property
    def num_parameters(self) -> int:
        """Trained elements, padding not counted."""
        return sum(rows.numel() for rows in self.rows.values())

    def refresh(self) -> None:
        """Let the encoders see the values as they are now, as `LoraAdapters.refresh`."""
        self.arena.refresh()

    def load(self, rows: Mapping[str, Tensor]) -> None:
        """Take values from elsewhere.

        Args:
            rows: [n, D] for each component.

        Raises:
            UserError: a component is missing or too many, or a shape does not fit. Nothing is
                written then.
        """
        if rows.keys() != self.rows.keys():
            raise UserError(
                f"{self.word}: has embeddings for {', '.join(rows)}, and the model wants them for "
                f"{', '.join(self.rows)}; it was made for another model"
            )
        for name, own in self.rows.items():
            if rows[name].shape != own.shape:
                raise UserError(
                    f"{self.word}: embeddings of shape {tuple(rows[name].shape)} for {name}, "
                    f"wanted {tuple(own.shape)}; they are of another model, or as many vectors"
                )
        for name, own in self.rows.items():
            own.copy_(rows[name])
        self.refresh()

    def keep_norms_(self, skipped: Tensor | None = None) -> None:
        """Scale each row back to the length of what ``init`` gave, whatever was loaded since.

        Source: our choice; a learned embedding much longer than those that a text encoder knows
        drowns the other words of a prompt.

        Args:
            skipped: 0-dim bool on the device, whether to leave all as it is; None for no.
        """
        for rows, norm in zip(self.rows.values(), self._norms, strict=True):
            factor = norm / rows.norm(dim=1, keepdim=True)
            rows.mul_(factor if skipped is None else torch.where(skipped, 1.0, factor))
        self.refresh()


class _LearnedRows:
    """Looks new ids up in the trained rows, in the dtype that the encoder computes in."""

    def __init__(self, rows: nn.Parameter, working: Tensor, whole: nn.Parameter) -> None:
        assert rows.grad is not None
        self.grad, self.working = rows.grad, working
        self.numbers = torch.arange(len(rows), device=rows.device)
        self._whole = whole

    def __call__(self, places: Tensor, frozen: Tensor) -> Tensor:
        """Return the embeddings, as `NewRows` says; the backward pass adds to the rows' gradient.

        No gradient of a whole table is ever made, and none is scattered: d rows = E^T g, with E
        [BK, n] one where a vector stands. The same bits every time, on a GPU too.
        """
        embeddings: Tensor = _LookUp.apply(places, frozen, self._whole, self)  # type: ignore[no-untyped-call]
        return embeddings


class _LookUp(torch.autograd.Function):
    """Chooses between frozen embeddings and trained ones."""

    @staticmethod
    def forward(
        ctx: Any, places: Tensor, frozen: Tensor, whole: Tensor, rows: _LearnedRows
    ) -> Tensor:
        """Return [B, K, D]."""
        ctx.save_for_backward(places)
        ctx.rows = rows
        learned = F.embedding(places.clamp(min=0), rows.working)
        return torch.where((places >= 0)[..., None], learned, frozen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        """Add to the gradient of the rows; the table has none."""
        if not ctx.needs_input_grad[2]:
            return None, None, None, None
        (places,) = ctx.saved_tensors
        rows: _LearnedRows = ctx.rows
        stands = (places.flatten() == rows.numbers[:, None]).to(grad.dtype)
        add_product_(rows.grad, stands, grad.flatten(0, -2), 1.0)
        return None, None, None, None


def _starts(text: TextEncoders, init: str, vectors: int, key: str) -> dict[str, Tensor]:
    """Return the rows that a new word starts from, [n, D] by component."""
    starts = {}
    for name, embeddings in text.embeddings_of(init).items():
        if len(embeddings) == 0:
            raise UserError(
                f"{key}.init: the model reads nothing in {init!r}; "
                "name a thing like the subject, such as 'dog'"
            )
        if len(embeddings) != vectors:
            # The mean of float32 values, whatever the encoder computes in.
            precise = torch.promote_types(embeddings.dtype, torch.float32)
            embeddings = embeddings.to(precise).mean(dim=0).expand(vectors, -1)
        starts[name] = embeddings
    return starts
