"""Tokenizers in GGUF files: llama.cpp splits texts into the same tokens."""

import itertools
import json
import re

import gguf
import pytest
import tiny
from llama_cpp import llama_cpp
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from optimum_fwdprune.export import export_gguf


TEXTS = [
    "Hello world",
    "  two  spaces   three ",
    "a\nb\n\nc\n\n\n d\ttab\r\nend",
    "12345 and 3.14159, 2024-11-30, 1000000",
    "😀👩‍👩‍👧‍👦 naïve café",
    "猫は日本語で cat。你好世界",
    "def f(x):\n    return {'a': [x**2, \"b\"]}  # it's I'LL\n",
    "CamelCase snake_case (ALLCAPS|x)",
]
# The regular expressions of LLaMA 3, o200k and BLOOM, as their tokenizer.json has them.
LLAMA3 = PRETOKENIZE_REGEX.replace(r"\p{N}|", r"\p{N}{1,3}|")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace(r"\p{N}{1,3}", r"\p{N}")
SEED = LLAMA3.replace("{1,3}", "{1}").replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+")
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # noqa: RUF001
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
BYTES_OF_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split_by(*regexes, behavior="isolated", invert=False):
    splits = [pre_tokenizers.Split(Regex(regex), behavior, invert) for regex in regexes]
    return pre_tokenizers.Sequence([*splits, BYTES])


def falcon():
    by_three = pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")
    digits = pre_tokenizers.Digits(individual_digits=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Punctuation("contiguous"), BYTES_OF_WORDS, digits, by_three])


def byte_level(splitter, ignore_merges=False):
    """A byte-level BPE over words of the texts, with one token that no merges make."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = splitter
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
    described = json.loads(trained.to_str())["model"]
    vocabulary = described["vocab"] | {"Ġwhole": len(described["vocab"])}
    merges = [tuple(merge) for merge in described["merges"]]
    whole = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
    whole.pre_tokenizer, whole.decoder = splitter, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<|endoftext|>")


def sentencepiece(prefix=True):
    """A tokenizer of LLaMA 2's kind, or without the prefix of Gemma's: BPE over spaces as `▁`, with bytes for what has
    no token."""
    replaced = normalizers.Replace(" ", "▁")
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), replaced]) if prefix else replaced
    trained = Tokenizer(models.BPE())
    trained.normalizer = spaces
    text = "the cat sat on the mat and the other cats sat there then they chatted on and on about hats"
    trained.train_from_iterator([text[start:] for start in range(len(text))], trainers.BpeTrainer(vocab_size=60))
    described = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *described["vocab"]]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    ranks = {"".join(merge): rank for rank, merge in enumerate(described["merges"])}
    # SentencePiece merges any two pieces that make a third, not just those that made it in training.
    merges = [
        (token[:cut], token[cut:])
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    whole = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    whole.normalizer = spaces
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def phi3():
    """SentencePiece's with special tokens that strip spaces after them, as Phi-3 has."""
    tokenizer = sentencepiece()
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
    tokenizer.add_tokens([AddedToken("<|user|>", rstrip=True, normalized=False, special=True)], special_tokens=True)
    return tokenizer


def metaspace(scheme, split=False):
    """SentencePiece's, with spaces marked by the splitter, as newer tokenizers of LLaMA 2 and Mistral do it."""
    tokenizer = sentencepiece()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    return tokenizer


def tokenized(tokenizer, texts, file):
    model = tiny.make_model("llama_mqa", vocab_size=len(tokenizer), num_hidden_layers=1)
    with llama_cpp(export_gguf(model, tokenizer, file)) as ask:
        return [ask.tokenized(text) for text in texts]


@pytest.mark.parametrize(
    ("splitter", "ignore_merges", "name"),
    [
        (BYTES_OF_WORDS, False, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES_OF_WORDS]), False, "smollm"),
        (split_by(PRETOKENIZE_REGEX), False, "qwen2"),
        (split_by(LLAMA3, behavior="removed", invert=True), False, "dbrx"),
        (split_by(LLAMA3), True, "llama-bpe"),
        (split_by(O200K), False, "gpt-4o"),
        (split_by(BLOOM), False, "bloom"),
        (split_by(TEKKEN), True, "tekken"),
        (split_by(SEED), False, "seed-coder"),
        (split_by(*DEEPSEEK), False, "deepseek-v3"),
        (falcon(), False, "falcon"),
    ],
)
def test_byte_level_vocabularies_split_text_as_they_did(splitter, ignore_merges, name, tmp_path):
    tokenizer = byte_level(splitter, ignore_merges)
    file, texts = tmp_path / "model.gguf", [*TEXTS, "a whole"]

    assert tokenized(tokenizer, texts, file) == [tokenizer(text)["input_ids"] for text in texts]
    assert (tokenizer.convert_tokens_to_ids("Ġwhole") in tokenizer("a whole")["input_ids"]) == ignore_merges
    assert gguf.GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == name


@pytest.mark.parametrize("make", [sentencepiece, lambda: sentencepiece(prefix=False), phi3])
def test_sentencepiece_vocabularies_split_text_as_they_did(make, tmp_path):
    tokenizer = make()
    texts = ["the cats chatted there", "  on the  other mat", "naïve 猫 hats\n\n", "then</s>they sat", "matthecat"]
    texts += ["".join(letters) for letters in itertools.permutations("aeht", 4)]
    texts += [*TEXTS, "<|user|>\n the cat"]
    file = tmp_path / "model.gguf"
    split = tokenized(tokenizer, texts, file)

    assert gguf.GGUFReader(file).fields["tokenizer.ggml.model"].contents() == "llama"
    assert split == [tokenizer(text)["input_ids"] for text in texts]
    assert any(3 <= number < 259 for number in split[2])


@pytest.mark.parametrize(
    ("splitter", "ignore_merges", "message"),
    [
        (split_by(r"\p{N}{1,3}|\s+"), False, r"\(Split, ByteLevel\) is not known.*such as gpt-2"),
        (BYTES_OF_WORDS, True, r"\(ByteLevel, ignore_merges\) is not known"),
        (split_by(TEKKEN), False, r"\(Split, ByteLevel\) is not known"),
        (split_by(LLAMA3, behavior="removed"), False, r"\(Split, ByteLevel\) is not known"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), False, "adds a space before a text"),
    ],
)
def test_other_ways_to_split_text_are_refused(splitter, ignore_merges, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tokenized(byte_level(splitter, ignore_merges), TEXTS, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def lowercased():
    tokenizer = byte_level(BYTES_OF_WORDS)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return tokenizer


def with_suffixes():
    tokenizer = byte_level(BYTES_OF_WORDS)
    tokenizer.backend_tokenizer.model.end_of_word_suffix = "</w>"
    return tokenizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lowercased, r"changes text before it splits it \(Lowercase\).*Remove this normalizer"),
        (with_suffixes, "end_of_word_suffix='</w>'"),
        (lambda: metaspace("always", split=True), r"splits text before its merges \(Metaspace with split=True\)"),
    ],
)
def test_other_changes_of_text_are_refused(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tokenized(make(), TEXTS, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def composed():
    tokenizer = byte_level(BYTES_OF_WORDS)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def stripping():
    tokenizer = byte_level(BYTES_OF_WORDS)
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    return tokenizer


def with_two_starts():
    """A tokenizer that begins texts with two tokens, as GLM-4's does."""
    tokenizer = byte_level(BYTES_OF_WORDS)
    tokenizer.add_special_tokens({"bos_token": "<sop>", "pad_token": "[gMASK]"})
    added = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[gMASK]", "<sop>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("[gMASK] <sop> $A", None, added)
    return tokenizer


@pytest.mark.parametrize(
    ("make", "same", "differs", "message"),
    [
        (composed, "café", "cafe\N{COMBINING ACUTE ACCENT}", "Unicode's form NFC"),
        (lambda: metaspace("first"), "the cat", "the</s>cat", "adds a space to the text after a special token"),
        (stripping, "the<mask>", "the <mask>", "strips spaces around <mask>"),
        (with_two_starts, None, "the cat", r"writes \[gMASK\] <sop> around a text"),
    ],
)
def test_texts_that_get_other_tokens_are_warned_of(make, same, differs, message, tmp_path, caplog):
    tokenizer = make()
    split = tokenized(tokenizer, [differs, same or ""], tmp_path / "model.gguf")

    assert re.search(message, caplog.text)
    assert split[0] != tokenizer(differs)["input_ids"]
    assert same is None or split[1] == tokenizer(same)["input_ids"]
