"""Tokenizers in GGUF files: byte-level BPE and SentencePiece's BPE, in the form that llama.cpp reads."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ..loading.tokenizers import tokens_around
from ..runs.loggers import get_logger
from .gguf_splits import check_spaces_are_marked, name_of_split, space_prefix, unicode_forms


if TYPE_CHECKING:
    from gguf import GGUFWriter


logger = get_logger(__name__)

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
    if strips and _has_phi3_tokens(tokenizer):
        return name if re.search("phi-?3", name, re.IGNORECASE) else f"phi3 {name}"
    return re.sub("phi-?3", "phi", name, flags=re.IGNORECASE)


def _has_phi3_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    return set(PHI3_TOKENS) <= set(tokenizer.get_vocab())


def checked_description(tokenizer: PreTrainedTokenizerBase, pre: str | None = None) -> dict[str, Any]:
    """Return the content of `tokenizer.json`; raise `ValueError` where a file cannot hold the tokenizer. The arguments
    are those of [`add_tokenizer`]."""
    description = _description_of(tokenizer)
    _check_model(description["model"], tokenizer)
    sentencepiece = _is_sentencepiece(description)
    unicode_forms(description, sentencepiece)
    if sentencepiece:
        check_spaces_are_marked(description)
    elif pre is None:
        name_of_split(description)
    return description


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int, pre: str | None = None) -> None:
    """Add tokens, merges, special tokens and chat template.

    Args:
        writer (`GGUFWriter`): writer of the file.
        tokenizer (`PreTrainedTokenizerBase`): a fast BPE tokenizer, byte-level or with byte fallback.
        rows (`int`): number of rows of the embeddings; unused tokens are added up to this number.
        pre (`str`, *optional*): llama.cpp's name for the way text is split before byte-level BPE.

    Raises:
        ValueError: where the tokenizer is of another kind, or splits or changes text in a way that llama.cpp does not,
            or that its name is not known for. Where single texts may become other tokens, a warning says which.
    """
    description = checked_description(tokenizer, pre)
    model, sentencepiece = description["model"], _is_sentencepiece(description)
    _warn_of_differences(description, tokenizer, sentencepiece)
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(tokens) >= rows:
        raise ValueError(
            f"The tokenizer has token {max(tokens)}, and the model has {rows} rows of embeddings; use the model's own "
            f"tokenizer."
        )
    listed = [tokens.get(number, f"[PAD{number}]") for number in range(rows)]
    writer.add_token_list(listed)
    kinds = _kinds_of(tokens, tokenizer, rows)
    writer.add_token_types(_with_bytes(kinds, tokens, tokenizer) if sentencepiece else kinds)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores_of(listed, merges))
        writer.add_add_space_prefix(space_prefix(description) != "never")
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or name_of_split(description))
        writer.add_token_merges([" ".join(merge) for merge in merges])
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    before, after = tokens_around(tokenizer)
    writer.add_add_bos_token(tokenizer.bos_token_id in before)
    writer.add_add_eos_token(tokenizer.eos_token_id in after)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(_templates_of(tokenizer.chat_template))


def _check_model(model: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` for tokenizers whose tokens llama.cpp does not put together in the same way."""
    if model["type"] != "BPE":
        raise ValueError(
            f"This {type(tokenizer).__name__} is no BPE ({model['type']}); only BPE tokenizers are exported to GGUF. "
            f"llama.cpp's own convert_hf_to_gguf.py supports others: export with format stock, then convert."
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise ValueError(
                f"This tokenizer has {name}={model[name]!r}, which llama.cpp's BPE does not have; only a stock "
                f"checkpoint holds it (--format stock)."
            )


def _warn_of_differences(description: dict[str, Any], tokenizer: PreTrainedTokenizerBase, sentencepiece: bool) -> None:
    """Warn of texts that llama.cpp turns into other tokens."""
    for form in unicode_forms(description, sentencepiece):
        logger.warning(
            "This tokenizer brings text into Unicode's form %s, and llama.cpp does not. Texts in another form "
            "give other tokens there, such as texts with letters and accents as separate characters.",
            form,
        )
    if sentencepiece and space_prefix(description) == "first":
        logger.warning(
            "llama.cpp adds a space to the text after a special token, and this tokenizer adds one at the start of a "
            "text alone (prepend_scheme='first'). Texts with special tokens inside, such as chats, give other tokens "
            "there."
        )
    stripping = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.lstrip or token.single_word or (token.rstrip and not _has_phi3_tokens(tokenizer))
    ]
    if stripping:
        logger.warning(
            "This tokenizer strips spaces around %s, or finds them as whole words alone, and llama.cpp does not. "
            "Texts with these tokens give other tokens there.",
            ", ".join(stripping[:5]) + (f" and {len(stripping) - 5} more" if len(stripping) > 5 else ""),
        )
    before, after = tokens_around(tokenizer)
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        logger.warning(
            "This tokenizer writes %s around a text, and llama.cpp adds no more than one BOS and one EOS token. Write "
            "the others into the prompt there.",
            " ".join(tokenizer.convert_ids_to_tokens([*before, *after])),
        )


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


def _is_sentencepiece(description: dict[str, Any]) -> bool:
    return bool(description["model"].get("byte_fallback"))


def _description_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer; load one with AutoTokenizer.")
    return json.loads(backend.to_str())
