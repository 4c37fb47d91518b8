"""The mini model's tokenizer: CLIP's byte-level BPE with a vocabulary of about a hundred words.

Each word of `WORDS` is one token. Any other text falls back to shorter pieces, down to single
bytes, so nothing is ever unknown.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from transformers import CLIPTokenizer

MODEL_MAX_LENGTH = 24
"""Tokens a prompt is padded or cut to: two special tokens and up to 22 words. CLIP's own 77 would
spend most of the mini text encoders' time on padding."""

START_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"

WORDS: tuple[str, ...] = (
    # what holds a prompt together
    *("a", "an", "and", "at", "by", "in", "near", "of", "on", "some", "the", "under", "with"),
    *("photo", "picture", "painting", "drawing", "sketch", "image", "view", "close", "up"),
    # colours
    *("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink"),
    *("black", "white", "gray", "brown"),
    # contexts
    *("snow", "beach", "jungle", "night", "sky", "brick", "wall", "wooden", "table", "grass"),
    *("desert", "forest", "city", "street", "water", "sea", "field", "floor", "room", "sunset"),
    # nouns
    *("toy", "robot", "dog", "cat", "duck", "bird", "fish", "bear", "car", "boat", "rocket"),
    *("kite", "boot", "hat", "backpack", "umbrella", "candle", "lamp", "mug", "cup", "teapot"),
    *("bottle", "chair", "ball", "book", "house", "tree", "flower", "mushroom", "star"),
    # adjectives, and the rare token of DreamBooth's prompts
    *("small", "big", "old", "new", "shiny", "striped", "round", "bright", "dark", "rare"),
    "sks",
)
"""The words that are one token each, in lower case (the tokenizer folds case)."""


def byte_symbols() -> list[str]:
    """Return the 256 printable characters that stand for the 256 bytes in byte-level BPE.

    The printable bytes of Latin-1 stand for themselves and come first; the other 68 are moved to
    code points from 256 on. Source: the byte-level encoding of GPT-2, which CLIP took over; the
    order is that of CLIP's vocabulary, so that "!" has id 0 here as well.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    num_moved = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(num_moved)]


def apply_merges(word: str, merges: Iterable[tuple[str, str]]) -> list[str]:
    """Split ``word`` as BPE does: from characters, merging pairs in order of their rank.

    Args:
        word: Letters a to z, without the end-of-word mark.
        merges: Pairs of pieces, the most urgent first.

    Returns:
        The pieces. The last one ends in ``</w>``.
    """
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    pieces = [*word[:-1], word[-1] + "</w>"]
    while True:
        ranked = [
            (ranks[pair], index) for index, pair in enumerate(pairwise(pieces)) if pair in ranks
        ]
        if not ranked:
            return pieces
        _, index = min(ranked)
        pieces[index : index + 2] = [pieces[index] + pieces[index + 1]]


def derive_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return BPE merges that make one token of each word.

    Each word in turn is split by the merges found so far; while more than one piece is left, the
    first two become the next merge. A later merge has a lower priority than all that a former word
    needs, so it cannot break that word up; and what words share is merged once.

    Args:
        words: Letters a to z each; the order decides the order of the merges.
    """
    merges: list[tuple[str, str]] = []
    for word in words:
        while len(pieces := apply_merges(word, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
    return merges


def mini_tokenizer(pad_token: str = END_TOKEN) -> CLIPTokenizer:
    """Build the tokenizer of the mini model.

    The vocabulary is, in this order: 256 bytes, 256 bytes that end a word, the merged pieces, the
    start token, the end token.

    Args:
        pad_token: What fills a prompt up. SDXL pads with the end token for its first text encoder
            and with "!" for its second.

    Returns:
        A tokenizer of `MODEL_MAX_LENGTH` tokens, the same at every call.
    """
    symbols = byte_symbols()
    merges = derive_merges(WORDS)
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    tokens += [left + right for left, right in merges]
    tokens += [START_TOKEN, END_TOKEN]
    # Two merges may spell the same piece; dict.fromkeys keeps the first.
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=END_TOKEN,
        bos_token=START_TOKEN,
        eos_token=END_TOKEN,
        pad_token=pad_token,
        model_max_length=MODEL_MAX_LENGTH,
    )
