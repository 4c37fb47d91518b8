"""The CLIP text encoders of a model, where text itself is trained: adapters, and new words.

Shape legend: B batch, K text tokens, D text width, N prompts, n vectors of a new word.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPAttention

from fastppt.errors import UserError
from fastppt.families.attention import AdapterSwitch, Projections

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The linears of a CLIP's attention."""


class NewRows(Protocol):
    """Embeddings of a new word in one text encoder."""

    def __call__(self, places: Tensor, frozen: Tensor) -> Tensor:
        """Return embeddings [B, K, D], those of the new word in the places where it stands.

        Args:
            places: [B, K] int64, which of the word's n vectors stands there; negative: none.
            frozen: [B, K, D], what the table has; arbitrary where the new word stands.
        """


class TextEncoders:
    """A pipeline's CLIPs and their tokenizers.

    Where adapters and new words are in place, whoever runs an encoder runs it with them. What an
    encoder computes is its own forward pass, so it is what the stock pipeline computes with the
    same embeddings loaded, the pooled text among it: transformers takes that where a prompt's
    highest id stands if the configuration says ``eos_token_id: 2``, as the published models' do.
    The ids of a new word are the highest, so it is then read at the word's last vector.

    Args:
        pipeline: The pretrained model.
        device: Where ids are put.

    Attributes:
        clips: The encoders by component, such as ``text_encoder``; empty once they are released.
        num_tokens: K, the tokens that a prompt is padded or cut to.
    """

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        parts = pipeline.components
        self._tokenizers: dict[str, Any] = {
            name: tokenizer
            for name, part in parts.items()
            if name.startswith("text_encoder")
            and part is not None
            and isinstance(
                tokenizer := parts[name.replace("text_encoder", "tokenizer")], CLIPTokenizer
            )
        }
        self.clips: dict[str, PreTrainedModel] = {name: parts[name] for name in self._tokenizers}
        self.num_tokens: int = next(iter(self._tokenizers.values())).model_max_length
        self._device = device
        self._groups: list[Projections] = []
        self._first_new_ids: dict[str, int] = {}

    def make_adaptable(self, unread: Collection[str] = ()) -> list[Projections]:
        """Give the attentions of the encoders places for adapters.

        A projection is named by component and path, ``text_model`` in it as files of adapters have
        it, whatever the release of transformers: ``text_encoder.text_model.encoder.layers.0.
        self_attn.q_proj``.

        Args:
            unread: Names of projections without a place, those of an attention all or none.

        Returns:
            Query, key and value of each attention together, then its output, in the order of the
            encoders' modules.
        """
        attentions = {
            f"{component}.text_model.{path.removeprefix('text_model.')}": attention
            for component, clip in self.clips.items()
            for path, attention in list(clip.named_modules())
            if isinstance(attention, CLIPAttention)
        }
        self._groups = [
            group
            for name, attention in attentions.items()
            if f"{name}.{PROJECTIONS[0]}" not in unread
            for group in _make_adaptable(name, attention)
        ]
        return self._groups

    @contextmanager
    def base(self) -> Iterator[None]:
        """Run the encoders inside without their adapters."""
        adapters = [group.adapter for group in self._groups if group.adapter is not None]
        switches: dict[int, AdapterSwitch] = {id(each.switch): each.switch for each in adapters}
        with ExitStack() as stack:
            for switch in switches.values():
                stack.enter_context(switch.base())
            yield

    def check_new_words(self, words: Sequence[str]) -> None:
        """Refuse a new word that the tokenizers cannot take as one.

        Args:
            words: One for each vector, as `add_words` takes them.

        Raises:
            UserError: a tokenizer knows one already, or reads it in another way than it is written.
        """
        word = words[0]
        for tokenizer in self._tokenizers.values():
            known = [each for each in words if _is_known(tokenizer, each)]
            if known:
                raise UserError(
                    f"prompts.token: {known[0]!r} is a word that the model knows already, so its "
                    "embedding cannot be a new one; take a word of your own, such as "
                    f"'<my-{word.strip('<>')}>'"
                )
        if word != word.lower():
            raise UserError(
                f"prompts.token: the model reads prompts in lower case; write {word.lower()!r} for "
                f"{word!r}"
            )
        if any(character.isspace() for character in word):
            raise UserError(f"prompts.token: a new word has no spaces in it, got {word!r}")

    def add_words(self, words: Sequence[str], rows: Mapping[str, NewRows]) -> None:
        """Teach all tokenizers the tokens of a new word, and the encoders where they find them.

        Their ids are those that diffusers' ``load_textual_inversion`` would give them. The tables
        of embeddings are not touched.

        Args:
            words: One for each vector, checked by `check_new_words`: the word, then ``word_1`` and
                so on, as that function names them.
            rows: Who looks the new ids up, by component.
        """
        for component, tokenizer in self._tokenizers.items():
            for word in words:
                tokenizer.add_tokens(word)
            ids = tokenizer.convert_tokens_to_ids(list(words))
            assert ids == list(range(ids[0], ids[0] + len(words)))
            self._first_new_ids[component] = ids[0]
            table = _ExtendedEmbedding(self.table(component), ids[0], rows[component])
            self.clips[component].set_input_embeddings(table)

    def expand(self, prompt: str) -> str:
        """Return a prompt with a word of several vectors written out, ``<v>`` as ``<v> <v>_1``.

        That is diffusers' own ``maybe_convert_prompt``, which its pipelines call where they load
        such words; a prompt is to be expanded once.
        """
        tokenizer = next(iter(self._tokenizers.values()))
        expanded: str = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)
        return expanded

    def has_new_word(self, prompt: str) -> bool:
        """Say whether a prompt is read with an embedding that `add_words` brought."""
        return any(
            max(self._tokenizers[component](prompt, verbose=False).input_ids) >= first
            for component, first in self._first_new_ids.items()
        )

    def ids(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the tokens of prompts by component, [N, K] int64 on the device.

        As the stock pipelines do: expanded, padded with each tokenizer's own token, cut.
        """
        texts = [self.expand(prompt) for prompt in prompts]
        return {
            component: tokenizer(
                texts,
                padding="max_length",
                max_length=self.num_tokens,
                truncation=True,
                return_tensors="pt",
                verbose=False,
            ).input_ids.to(self._device)
            for component, tokenizer in self._tokenizers.items()
        }

    def embeddings_of(self, text: str) -> dict[str, Tensor]:
        """Return what the tables have for the tokens of some words, [tokens, D] by component."""
        embeddings = {}
        for component, tokenizer in self._tokenizers.items():
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            embeddings[component] = self.table(component).weight.detach()[ids]
        return embeddings

    def table(self, component: str) -> nn.Embedding:
        """Return an encoder's table of embeddings, which stays as it is."""
        table: nn.Embedding = self.clips[component].get_input_embeddings()
        return table

    def release(self) -> None:
        """Give up the encoders."""
        self.clips.clear()
        self._groups.clear()


class _Shared:
    """Computes projections that share an input at once, where their module asks one by one.

    Whoever asks first has all of them computed; the others take what is there.
    """

    def __init__(self, group: Projections) -> None:
        self._group = group
        self._inputs: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def __call__(self, place: int, inputs: Tensor) -> Tensor:
        if inputs is not self._inputs:
            self._inputs, self._outputs = inputs, dict(enumerate(self._group(inputs)))
        output = self._outputs.pop(place)
        if not self._outputs:
            # Nothing of a pass is kept alive by what comes after it.
            self._inputs = None
        return output


class _SharedLinear(nn.Linear):
    """One of several linears in its module's place; its parameters are the linear's own."""

    def __init__(self, linear: nn.Linear, place: int, shared: _Shared) -> None:
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        self.weight, self.bias = linear.weight, linear.bias
        self._place, self._shared = place, shared

    def forward(self, inputs: Tensor) -> Tensor:
        """Project [..., I] to [..., O]."""
        return self._shared(self._place, inputs)


class _ExtendedEmbedding(nn.Embedding):
    """A frozen table that knows new ids beside its own; its weight is the table's."""

    def __init__(self, table: nn.Embedding, first_new_id: int, rows: NewRows) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=table.weight.detach())
        self.weight = table.weight
        self._first_new_id, self._rows = first_new_id, rows
        self._last_id = min(first_new_id, table.num_embeddings) - 1

    def forward(self, input: Tensor) -> Tensor:
        """Return embeddings [B, K, D] of ids [B, K]."""
        frozen = F.embedding(input.clamp(max=self._last_id), self.weight)
        return self._rows(input - self._first_new_id, frozen)


def _make_adaptable(name: str, attention: CLIPAttention) -> Iterator[Projections]:
    """Route the attention's linears through groups of projections."""
    for parts in (PROJECTIONS[:3], PROJECTIONS[3:]):
        linears = tuple(attention.get_submodule(part) for part in parts)
        group = Projections(tuple(f"{name}.{part}" for part in parts), linears)
        shared = _Shared(group)
        for place, (part, linear) in enumerate(zip(parts, linears, strict=True)):
            setattr(attention, part, _SharedLinear(linear, place, shared))
        yield group


def _is_known(tokenizer: Any, word: str) -> bool:
    """Say whether a word is one token, or diffusers would refuse to load it as a new one."""
    return len(tokenizer.tokenize(word)) == 1 or word in tokenizer.get_vocab()
