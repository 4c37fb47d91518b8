"""The mini models' T5 tokenizer: unigram pieces, a vocabulary of about two hundred.

Each word of `WORDS` is one token. Other text in printable ASCII falls back to single characters;
what lies outside of it is the unknown token, as what its vocabulary lacks is for T5.
"""

import string

from transformers import T5Tokenizer

from fastppt.mini.tokenizer import WORDS

PAD_TOKEN, END_TOKEN, UNKNOWN_TOKEN = "<pad>", "</s>", "<unk>"
"""Ids 0, 1 and 2, as in T5."""

SPACE = "\u2581"
"""Stands for the space before a word, as in SentencePiece."""

MODEL_MAX_LENGTH = 512
"""Tokens; T5's own. A T5 has relative positions, so nothing in the model limits it."""

CHARACTERS = string.ascii_letters + string.digits + string.punctuation
"""The pieces that a word outside the vocabulary is made of."""

WORD_SCORE, CHARACTER_SCORE = -1.0, -2.0
"""Log probabilities up to a constant. The split of the highest sum wins: with these a word that is
one piece beats any split into several."""


def mini_t5_tokenizer() -> T5Tokenizer:
    """Build the T5 tokenizer of the mini models.

    The vocabulary is, in this order: padding, end, unknown, the space, the characters, the words
    with the space before them. T5's hundred sentinel tokens are left out: only its pretraining
    uses them.

    Returns:
        A tokenizer that ends a prompt with ``</s>`` and pads with ``<pad>``, the same at every
        call.
    """
    pieces = [(token, 0.0) for token in (PAD_TOKEN, END_TOKEN, UNKNOWN_TOKEN)]
    pieces += [(character, CHARACTER_SCORE) for character in (SPACE, *CHARACTERS)]
    pieces += [(SPACE + word, WORD_SCORE) for word in WORDS]
    return T5Tokenizer(
        vocab=pieces,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        extra_ids=0,
        model_max_length=MODEL_MAX_LENGTH,
    )
