"""Prompts with a learned word, encoded from the equations: nothing of the product.

Every weight W + s B A of a text encoder is formed whole, and so is its embedding table with the new
rows below it. Tokenizers and text encoders are those of a fresh pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppt.mini import build_mini

PLACES = 24
"""Tokens that each of the mini models' text encoders reads."""


class Encoded(NamedTuple):
    """What attention reads, and what is pooled."""

    tokens: Tensor
    pooled: Tensor | None


class PlainText:
    """Subject and class prompts of photos.

    Args:
        model: Name of the mini model.
        captions: Of each photo, with {subject}.
        words: The learned word and what its further vectors are called.
        noun: The class noun, as many tokens as words.

    Attributes:
        rows: By text encoder, [vectors, width]; put there by the test.
        pairs: By text encoder, and in it by projection: down, up, scale; likewise.
    """

    def __init__(self, model: str, captions: Sequence[str], words: Sequence[str], noun: str):
        self.pipeline: Any = build_mini(model)
        self.captions, self.words, self.noun = captions, words, noun
        self.rows: dict[str, Tensor] = {}
        self.pairs: dict[str, dict[str, tuple[Tensor, Tensor, float]]] = {}
        for name in self.clips:
            getattr(self.pipeline, name).double()
            assert self._tokenizer(name).add_tokens(list(words)) == len(words)
        if self.has_t5:
            self.pipeline.text_encoder_3.double()

    @property
    def clips(self) -> list[str]:
        """Names of the text encoders that learn."""
        return [n for n in ("text_encoder", "text_encoder_2") if hasattr(self.pipeline, n)]

    @property
    def has_t5(self) -> bool:
        """Whether there is a T5 beside them."""
        return hasattr(self.pipeline, "text_encoder_3")

    def subject(self, photos: Tensor) -> Encoded:
        """The subject prompts of photos, from all that is learned."""
        clip = [self.captions[i].replace("{subject}", " ".join(self.words)) for i in photos]
        t5 = [self.captions[i].replace("{subject}", self.words[0]) for i in photos]
        return self._encode(clip, t5, learned=True)

    def plain_class(self, photos: Tensor) -> Encoded:
        """The class prompts of photos, from the weights as they were published."""
        texts = [self.captions[i].replace("{subject}", self.noun) for i in photos]
        with torch.no_grad():
            return self._encode(texts, texts, learned=False)

    def columns(self, photos: Tensor) -> list[list[int]]:
        """For each photo and token of its subject prompt, the token of its class prompt."""
        found = []
        for photo in photos:
            before, after = (len(part.split()) for part in self.captions[photo].split("{subject}"))
            num_noun = len(self.noun.split())
            row = _columns(1 + before, len(self.words), num_noun, after)
            if self.has_t5:
                num_word = len(self.pipeline.tokenizer_3(self.words[0]).input_ids) - 1
                t5 = _columns(before, num_word, num_noun, after)
                row += [column + PLACES if column >= 0 else column for column in t5]
            found.append(row)
        return found

    def _encode(self, clip: list[str], t5: list[str], *, learned: bool) -> Encoded:
        outputs = [self._clip(name, clip, learned) for name in self.clips]
        if len(self.clips) == 1:
            return Encoded(outputs[0].last_hidden_state, None)
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        if not self.has_t5:
            return Encoded(tokens, outputs[1].text_embeds)
        ids = self._ids(self.pipeline.tokenizer_3, t5)
        with torch.no_grad():
            of_t5 = self.pipeline.text_encoder_3(ids)[0]
        padding = tokens.new_zeros(*tokens.shape[:2], of_t5.shape[2] - tokens.shape[2])
        tokens = torch.cat([torch.cat([tokens, padding], 2), of_t5], 1)
        return Encoded(tokens, torch.cat([output.text_embeds for output in outputs], 1))

    def _clip(self, name: str, texts: list[str], learned: bool) -> Any:
        encoder = getattr(self.pipeline, name)
        weights = {key: value.detach() for key, value in encoder.named_parameters()}
        if learned:
            (table,) = (key for key in weights if key.endswith("token_embedding.weight"))
            weights[table] = torch.cat([weights[table], self.rows[name]])
            for path, (down, up, scale) in self.pairs.get(name, {}).items():
                (key,) = (key for key in weights if key.endswith(f"{path}.weight"))
                weights[key] = weights[key] + scale * (up @ down)
        ids = self._ids(self._tokenizer(name), texts)
        return torch.func.functional_call(encoder, weights, (ids,), {"output_hidden_states": True})

    def _tokenizer(self, name: str) -> Any:
        return getattr(self.pipeline, name.replace("text_encoder", "tokenizer"))

    @staticmethod
    def _ids(tokenizer: Any, texts: list[str]) -> Tensor:
        padded = tokenizer(texts, padding="max_length", max_length=PLACES, truncation=True)
        return torch.tensor(padded.input_ids)


def _columns(before: int, num_word: int, num_noun: int, after: int) -> list[int]:
    columns = [-1] * PLACES
    for place in range(before + min(num_word, num_noun)):
        columns[place] = place
    # The words after the subject, and the end token.
    for place in range(after + 1):
        columns[before + num_word + place] = before + num_noun + place
    for place in range(before + max(num_word, num_noun) + after + 1, PLACES):
        columns[place] = place
    return columns
