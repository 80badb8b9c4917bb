"""Tokenizers in GGUF files: byte-level BPE and SentencePiece's BPE, in the form that llama.cpp reads."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase


if TYPE_CHECKING:
    from gguf import GGUFWriter


# Regular expressions that split text before byte-level BPE, with llama.cpp's names for them.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD, _REST = r"[^\r\n\p{L}\p{N}]?", r"|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_REST}": "dbrx",
    rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_REST}": "qwen2",
    rf"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_REST}": "gpt-4o",
    r" ?[^(\s|[.,!?…。，、।۔،])]+": "bloom",  # noqa: RUF001
}
# Names for the same ways to split, for tokenizers that leave words whole that are tokens (`ignore_merges`).
WHOLE_WORDS = {"dbrx": "llama-bpe"}
# In SentencePiece's vocabularies, a token for a single byte of text that no other token covers.
BYTE = re.compile("<0x[0-9A-F]{2}>")


# Tokens that llama.cpp expects of Phi-3, of which the last one alone strips spaces after it.
PHI3_TOKENS = ("<unk>", "<s>", "<|endoftext|>", "</s>")


def name_for(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of a model in its file, by which llama.cpp knows whether special tokens strip spaces after them.

    It takes those of models named phi3 or phi-3 to do so, and fails to load these where they lack Phi-3's tokens.

    Args:
        name (`str`): name of the model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
    """
    added = tokenizer.added_tokens_decoder.values()
    strips = any(token.rstrip for token in added if token.content not in PHI3_TOKENS)
    if strips and set(PHI3_TOKENS) <= set(tokenizer.get_vocab()):
        return name if re.search("phi-?3", name, re.IGNORECASE) else f"phi3 {name}"
    return re.sub("phi-?3", "phi", name, flags=re.IGNORECASE)


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int, pre: str | None = None) -> None:
    """Add tokens, merges, special tokens and chat template.

    Args:
        writer (`GGUFWriter`): writer of the file.
        tokenizer (`PreTrainedTokenizerBase`): a fast BPE tokenizer, byte-level or with byte fallback.
        rows (`int`): number of rows of the embeddings; unused tokens are added up to this number.
        pre (`str`, *optional*): llama.cpp's name for the way text is split before byte-level BPE.

    Raises:
        ValueError: where the tokenizer is of another kind, or splits text in a way that llama.cpp's name is not known
            for.
    """
    description = _description_of(tokenizer)
    model = description["model"]
    if model["type"] != "BPE":
        raise ValueError(
            f"This {type(tokenizer).__name__} is no BPE ({model['type']}); only BPE tokenizers are exported to GGUF. "
            f"llama.cpp's own convert_hf_to_gguf.py supports others: export with format stock, then convert."
        )
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(tokens) >= rows:
        raise ValueError(
            f"The tokenizer has token {max(tokens)}, and the model has {rows} rows of embeddings; use the model's own "
            f"tokenizer."
        )
    listed = [tokens.get(number, f"[PAD{number}]") for number in range(rows)]
    writer.add_token_list(listed)
    sentencepiece = bool(model.get("byte_fallback"))
    kinds = _kinds_of(tokens, tokenizer, rows)
    writer.add_token_types(_with_bytes(kinds, tokens, tokenizer) if sentencepiece else kinds)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores_of(listed, merges))
        writer.add_add_space_prefix(_adds_space(description))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or _pre_tokenizer_of(description))
        writer.add_token_merges([" ".join(merge) for merge in merges])
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    start = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(start) and start[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(start) and start[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(_templates_of(tokenizer.chat_template))


def _templates_of(template: str | dict[str, str] | list[dict[str, str]]) -> str | list[dict[str, str]]:
    """Return chat templates in the file's form: one text, or a list of several with names."""
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template


def _kinds_of(tokens: dict[int, str], tokenizer: PreTrainedTokenizerBase, rows: int) -> list[int]:
    import gguf

    kinds: list[int] = [gguf.TokenType.NORMAL if number in tokens else gguf.TokenType.UNUSED for number in range(rows)]
    for number, token in tokenizer.added_tokens_decoder.items():
        kinds[number] = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    return kinds


def _with_bytes(kinds: list[int], tokens: dict[int, str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the kinds of tokens with those that only SentencePiece's vocabularies have."""
    import gguf

    for number, token in tokens.items():
        if number == tokenizer.unk_token_id:
            kinds[number] = gguf.TokenType.UNKNOWN
        elif kinds[number] == gguf.TokenType.NORMAL and BYTE.fullmatch(token):
            kinds[number] = gguf.TokenType.BYTE
    return kinds


def _scores_of(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Return scores that reproduce the order of merges; SentencePiece first merges the pair of the highest score."""
    ranks: dict[str, int] = {}
    for merge in merges:
        ranks.setdefault("".join(merge), len(ranks))
    return [-float(ranks.get(token, 0)) for token in tokens]


def _adds_space(description: dict[str, Any]) -> bool:
    """Return whether the tokenizer adds a space before a text."""
    normalizer, splitter = description.get("normalizer") or {}, description.get("pre_tokenizer") or {}
    steps = [*normalizer.get("normalizers", [normalizer]), *splitter.get("pretokenizers", [splitter])]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step["prepend_scheme"] != "never")
        for step in steps
    )


def _description_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer; load one with AutoTokenizer.")
    return json.loads(backend.to_str())


def _pre_tokenizer_of(description: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way text is split."""
    splitter = description.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    kinds, last = [step.get("type") for step in steps], steps[-1]
    if last.get("add_prefix_space"):
        raise ValueError(
            "This tokenizer adds a space before a text (add_prefix_space), and llama.cpp's byte-level BPE does not. "
            "Set it to False to export the tokenizer without the space."
        )
    name = None
    if kinds == ["ByteLevel"] and last["use_regex"]:
        name = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and last["use_regex"] and steps[0]["individual_digits"]:
        name = "smollm"
    elif kinds == ["Split", "ByteLevel"] and not last["use_regex"]:
        name = SPLITS.get(steps[0]["pattern"].get("Regex", ""))
    whole_words = bool(description["model"].get("ignore_merges"))
    name = WHOLE_WORDS.get(name or "") if whole_words else name
    if name is None:
        raise ValueError(
            f"llama.cpp's name for the way this tokenizer splits text ({', '.join(map(str, kinds))}"
            f"{', ignore_merges' if whole_words else ''}) is not known. Pass it as pre_tokenizer, such as gpt-2, "
            f"llama-bpe or qwen2."
        )
    return name
