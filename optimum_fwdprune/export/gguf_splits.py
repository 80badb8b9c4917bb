"""How tokenizers split and change text before BPE, by llama.cpp's names; what it has no name for is refused."""

from __future__ import annotations

from typing import Any


# Regular expressions that split text before byte-level BPE, with llama.cpp's names for them. Each matches all text.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD, _SPACES = r"[^\r\n\p{L}\p{N}]?", r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_START, _OTHERS = rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+", r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_REGEXES = {
    rf"{_START}|\p{{N}}{{1,3}}{_OTHERS}{_SPACES}": "dbrx",
    rf"{_START}|\p{{N}}{_OTHERS}{_SPACES}": "qwen2",
    rf"{_START}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{_SPACES}": "seed-coder",
    rf"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}": "gpt-4o",
    rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}": "tekken",
}
# It leaves out some spaces, which are words of their own.
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # noqa: RUF001
# Several splits, one after the other.
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
_THREE_DIGITS = "[0-9][0-9][0-9]"
# Names for the same ways to split, for tokenizers that leave words whole that are tokens (`ignore_merges`); `None`
# where llama.cpp has no such name. All other names need merges.
_WHOLE_WORDS = {"dbrx": "llama-bpe", "tekken": "tekken"}
# Names of ways to split that always leave words whole.
_ALWAYS_WHOLE = ("tekken",)

# Changes of Unicode's forms, which leave most texts as they are, and which llama.cpp does not make.
UNICODE_FORMS = ("NFC", "NFKC", "NFD", "NFKD")


def name_of_split(description: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way a byte-level BPE splits text.

    Args:
        description (`dict`): the content of `tokenizer.json`.

    Raises:
        ValueError: where llama.cpp has no name for it, or none is known here.
    """
    steps = _steps(description, "pre_tokenizer", "pretokenizers")
    kinds = [step.get("type") for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        raise ValueError(
            "This tokenizer adds a space before a text (add_prefix_space), and llama.cpp's byte-level BPE does not. "
            "Set it to False to export the tokenizer without the space."
        )
    whole_words = bool(description["model"].get("ignore_merges"))
    name = _name_of(kinds, steps)
    if whole_words:
        name = _WHOLE_WORDS.get(name or "")
    elif name in _ALWAYS_WHOLE:
        name = None
    if name is None:
        raise ValueError(
            f"llama.cpp's name for the way this tokenizer splits text ({', '.join(map(str, kinds))}"
            f"{', ignore_merges' if whole_words else ''}) is not known. Pass it as pre_tokenizer, such as gpt-2, "
            f"llama-bpe or qwen2."
        )
    return name


def check_spaces_are_marked(description: dict[str, Any]) -> None:
    """Raise `ValueError` where a SentencePiece BPE splits text before its merges, which llama.cpp's does not."""
    for step in _steps(description, "pre_tokenizer", "pretokenizers"):
        kind = step.get("type")
        # Gemma splits at spaces that its normalizer has replaced already.
        after_replacing = kind == "Split" and step["pattern"] == {"String": " "} and _replaces_spaces(description)
        if kind is None or after_replacing or (kind == "Metaspace" and not step.get("split", True)):
            continue
        split = f"{kind} with split=True" if kind == "Metaspace" else kind
        raise ValueError(
            f"This tokenizer splits text before its merges ({split}), and llama.cpp's SentencePiece BPE does not. "
            f"llama.cpp's own convert_hf_to_gguf.py may support it: export with format stock, then convert."
        )


def unicode_forms(description: dict[str, Any], sentencepiece: bool) -> list[str]:
    """Return the names of Unicode's forms that a tokenizer brings text into, which llama.cpp does not do.

    Args:
        description (`dict`): the content of `tokenizer.json`.
        sentencepiece (`bool`): whether it is SentencePiece's BPE, where spaces become `▁`.

    Raises:
        ValueError: where it changes text in another way before it is split.
    """
    forms = []
    for step in _steps(description, "normalizer", "normalizers"):
        kind = step.get("type")
        marks_spaces = kind == "Prepend" or (kind == "Replace" and step["pattern"] == {"String": " "})
        if kind in UNICODE_FORMS:
            forms.append(kind)
        elif kind is not None and not (sentencepiece and marks_spaces):
            raise ValueError(
                f"This tokenizer changes text before it splits it ({kind}), and llama.cpp does not. Remove this "
                f"normalizer to export the tokenizer without the change."
            )
    return forms


def space_prefix(description: dict[str, Any]) -> str:
    """Return where a SentencePiece BPE adds a space: before a text and after every special token (`"always"`), before
    a text alone (`"first"`), or nowhere (`"never"`)."""
    for step in _steps(description, "normalizer", "normalizers"):
        if step.get("type") == "Prepend":
            return "always"
    for step in _steps(description, "pre_tokenizer", "pretokenizers"):
        if step.get("type") == "Metaspace":
            return str(step["prepend_scheme"])
    return "never"


def _name_of(kinds: list[str | None], steps: list[dict[str, Any]]) -> str | None:
    *splits, last = steps
    if last.get("type") == "ByteLevel" and not last["use_regex"]:
        if any(kind != "Split" for kind in kinds[:-1]):
            return None
        regexes = tuple(step["pattern"].get("Regex", "") for step in splits)
        isolated = all(step["behavior"] == "Isolated" for step in splits)
        if isolated and regexes in ((_BLOOM,), _DEEPSEEK):
            return "bloom" if regexes == (_BLOOM,) else "deepseek-v3"
        # What no match covers is removed then, and matches cover all text.
        whole = isolated or all(step["behavior"] == "Removed" and step["invert"] for step in splits)
        return _REGEXES.get(regexes[0]) if whole and len(regexes) == 1 else None
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Punctuation", "ByteLevel", "Digits", "Split"]:
        contiguous = steps[0]["behavior"] == "Contiguous" and not steps[2]["individual_digits"]
        by_three = steps[3]["pattern"] == {"Regex": _THREE_DIGITS} and steps[3]["behavior"] == "Isolated"
        return "falcon" if contiguous and by_three and steps[1]["use_regex"] else None
    return None


def _replaces_spaces(description: dict[str, Any]) -> bool:
    steps = _steps(description, "normalizer", "normalizers")
    return any(step.get("type") == "Replace" and step["pattern"] == {"String": " "} for step in steps)


def _steps(description: dict[str, Any], name: str, parts: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or a pre-tokenizer, which may be sequences of sequences."""
    return _flat(description.get(name) or {}, parts)


def _flat(step: dict[str, Any], parts: str) -> list[dict[str, Any]]:
    inner = step.get(parts)
    return [step] if inner is None else [flat for part in inner for flat in _flat(part, parts)]
