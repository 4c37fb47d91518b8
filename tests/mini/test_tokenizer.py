import pytest
from transformers import CLIPTokenizer

from fastppt.mini.tokenizer import (
    MODEL_MAX_LENGTH,
    WORDS,
    apply_merges,
    byte_symbols,
    derive_merges,
    mini_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer():
    return mini_tokenizer()


def test_byte_symbols_are_256_printable_characters():
    symbols = byte_symbols()
    assert len(set(symbols)) == 256
    assert symbols[0] == "!"
    assert all(symbol.isprintable() and not symbol.isspace() for symbol in symbols)


def test_words_are_distinct_lower_case_letters():
    assert len(set(WORDS)) == len(WORDS)
    assert all(word.isascii() and word.isalpha() and word.islower() for word in WORDS)


def test_each_word_is_one_token_alone_and_in_a_prompt(tokenizer):
    single = {word: tokenizer.tokenize(word) for word in WORDS}
    assert single == {word: [word + "</w>"] for word in WORDS}
    prompt = " ".join(WORDS)
    assert tokenizer.tokenize(prompt) == [word + "</w>" for word in WORDS]


def test_merges_do_not_depend_on_which_words_share_pieces():
    # "robot" holds "bo" of "boat", and "coco" holds one pair twice.
    for words in (["boat", "robot", "coco"], ["coco", "robot", "boat"]):
        merges = derive_merges(words)
        assert len(set(merges)) == len(merges)
        assert [apply_merges(word, merges) for word in words] == [[w + "</w>"] for w in words]


def test_shared_prefix_is_merged_once():
    # Three merges for boat; boot shares b+o and needs two more.
    assert len(derive_merges(["boat"])) == 3
    assert len(derive_merges(["boat", "boot"])) == 5


def test_our_splitting_is_the_tokenizers(tokenizer):
    merges = derive_merges(WORDS)
    for word in ("boats", "photograph", "zebra", "robotic", "snowman", "o"):
        assert tokenizer.tokenize(word) == apply_merges(word, merges)


@pytest.mark.parametrize(
    "text",
    ["qwerty zyxw", "photograph", "héllo wörld", "日本 の 犬", "a photo of sks zebra", "🤖", "4 2"],
)
def test_unknown_text_comes_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_byte_has_a_token(tokenizer):
    vocabulary = tokenizer.get_vocab()
    for symbol in byte_symbols():
        assert symbol in vocabulary
        assert symbol + "</w>" in vocabulary


def test_special_tokens_are_last_and_frame_a_prompt(tokenizer):
    num_tokens = len(tokenizer)
    assert sorted(tokenizer.get_vocab().values()) == list(range(num_tokens))
    assert tokenizer.bos_token == "<|startoftext|>"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (start, end) == (num_tokens - 2, num_tokens - 1)
    ids = tokenizer("a dog", padding="max_length").input_ids
    assert len(ids) == MODEL_MAX_LENGTH
    assert ids[0] == start
    assert ids[3:] == [end] * (MODEL_MAX_LENGTH - 3)


def test_long_prompt_is_cut_to_the_maximum(tokenizer):
    ids = tokenizer("dog " * 100, truncation=True).input_ids
    assert len(ids) == MODEL_MAX_LENGTH == tokenizer.model_max_length
    assert ids[-1] == tokenizer.eos_token_id


def test_second_pad_token_fills_with_exclamation_marks():
    tokenizer = mini_tokenizer(pad_token="!")
    ids = tokenizer("a dog", padding="max_length").input_ids
    assert ids[3] == tokenizer.eos_token_id
    assert ids[4:] == [0] * (MODEL_MAX_LENGTH - 4)
    assert tokenizer.get_vocab() == mini_tokenizer().get_vocab()


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
def test_saved_tokenizer_gives_the_same_ids(tmp_path, pad_token):
    tokenizer = mini_tokenizer(pad_token)
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.model_max_length == MODEL_MAX_LENGTH
    for text in (" ".join(WORDS[:20]), "a photo of sks zebra in 日本", ""):
        wanted = tokenizer(text, padding="max_length", truncation=True).input_ids
        assert loaded(text, padding="max_length", truncation=True).input_ids == wanted


def test_added_token_is_one_token(tokenizer):
    fresh = mini_tokenizer()
    assert fresh.add_tokens("<v>") == 1
    ids = fresh("a photo of <v> dog").input_ids
    assert ids[4] == len(tokenizer)
    assert len(ids) == 7
