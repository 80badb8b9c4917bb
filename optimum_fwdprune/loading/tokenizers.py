"""Loading tokenizers from a folder or from the Hub, with errors that name missing packages."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any, TypeAlias

from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import cached_file, is_protobuf_available, is_sentencepiece_available

from ..runs.loggers import get_logger
from .models import WHERE
from .offline import naming_offline


logger = get_logger(__name__)

# Names of files that hold a tokenizer or a part of one.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer_config.json",
)
# What a tokenizer may be named by.
AnyTokenizer: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin | str | Path

# A line of tiktoken's files: a token in base 64, and its number.
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s*")

# Names of files that hold the processor of a multimodal model or a part of one.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")

OTHERWISE = "name another tokenizer with tokenizer=... (--tokenizer)"


def load_tokenizer(model_id: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase | None:
    """Load a model's own tokenizer.

    Args:
        model_id (`str` or `Path`): folder, or repository of the Hub.
        kwargs: for `AutoTokenizer.from_pretrained`.

    Returns:
        `PreTrainedTokenizerBase`, or `None` where there are no files of a tokenizer.

    Raises:
        ValueError: where there are such files, but they cannot be read; the message names missing packages.
    """
    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    if Path(model_id).is_dir():
        # It is checked first, since transformers tries several packages and names only the last one in its error.
        _check_packages(model_id, tokenizer_files(model_id, **where))
    failure: Exception | None = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_id, **kwargs)
        if _has_words(tokenizer):
            return tokenizer
    except Exception as error:  # Readers of damaged files raise errors of many types.
        failure = error
    files = tokenizer_files(model_id, **where)
    if not files:
        return None
    _check_packages(model_id, files)
    why = "it has no vocabulary" if failure is None else " ".join(str(failure).split()).rstrip(".")
    raise ValueError(
        f"The tokenizer of {model_id} ({', '.join(files)}) cannot be loaded: {why}. Repair its files, or {OTHERWISE}."
    ) from failure


def load_processor(model_id: str | Path, **kwargs: Any) -> ProcessorMixin | None:
    """Load the processor of a multimodal model, with its tokenizer.

    Args:
        model_id (`str` or `Path`): folder, or repository of the Hub.
        kwargs: for `AutoProcessor.from_pretrained`.

    Returns:
        `ProcessorMixin`, or `None` where there is none, or where it needs packages that are not installed, of which a
        warning tells.
    """
    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if not any(cached_file(str(model_id), name, **where, **missing) for name in PROCESSOR_FILES):
        return None
    try:
        processor = AutoProcessor.from_pretrained(model_id, **kwargs)
    except Exception as error:  # Image processors fail in many ways where their packages are missing.
        logger.warning(
            "The processor of %s cannot be loaded, so that checkpoints are saved with its tokenizer alone: %s",
            model_id,
            error,
        )
        return None
    return processor if isinstance(processor, ProcessorMixin) else None


def tokenizer_and_processor(
    named: AnyTokenizer | None,
) -> tuple[PreTrainedTokenizerBase | None, ProcessorMixin | None]:
    """Return the tokenizer that the user named, and the processor where it was one that holds the tokenizer."""
    processor = named if isinstance(named, ProcessorMixin) else None
    tokenizer = named if processor is None else getattr(processor, "tokenizer", None)
    return None if tokenizer is None else named_tokenizer(tokenizer), processor


def named_tokenizer(tokenizer: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Return a tokenizer that the user named to replace the model's own.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, `str` or `Path`): a tokenizer, or its folder or repository.
        kwargs: for `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: where the argument is no tokenizer, or the folder or repository has none.
        OSError: where the folder or repository cannot be read.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if not isinstance(tokenizer, (str, Path)):
        raise ValueError(
            f"tokenizer must be a tokenizer of transformers, or its folder or repository; got a "
            f"{type(tokenizer).__name__}."
        )
    try:
        loaded = load_tokenizer(tokenizer, **kwargs)
        if loaded is None:
            if not Path(tokenizer).is_dir():
                # The repository may not exist, or cannot be reached, for which this raises an error.
                with naming_offline(tokenizer, "name a folder that holds a tokenizer"):
                    where = {name: kwargs[name] for name in WHERE if name in kwargs}
                    cached_file(str(tokenizer), TOKENIZER_FILES[-1], **where)
            raise ValueError(f"{tokenizer} has no files of a tokenizer ({', '.join(TOKENIZER_FILES)}).")
    except (OSError, ValueError) as error:
        # The model is loaded too, so that the error must name the tokenizer.
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"Cannot load the tokenizer {tokenizer}: {error}") from error
    return loaded


def tokenizer_files(model_id: str | Path, **where: Any) -> dict[str, Path]:
    """Return the files of a tokenizer that a folder or repository has, or its copy in the cache."""
    files: dict[str, Path] = {}
    quiet = dict.fromkeys(
        ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False
    ) | {"_raise_exceptions_for_gated_repo": False}
    for name in TOKENIZER_FILES:
        try:
            file = cached_file(str(model_id), name, **where, **quiet)
        except OSError:
            # There is no such repository, for which loading the model raises an error.
            return {}
        if file is not None:
            files[name] = Path(file)
    return files


def warn_of_missing_tokenizer(model_id: str) -> None:
    """Warn where a checkpoint is saved without a tokenizer although its base has one.

    Args:
        model_id (`str`): the base, of which only a local folder or the copy in the cache is searched.
    """
    if model_id and (files := tokenizer_files(model_id, local_files_only=True)):
        logger.warning(
            "The checkpoint is saved without a tokenizer, although %s has one (%s). FwdPruner(model, tokenizer) saves "
            "it too.",
            model_id,
            ", ".join(files),
        )


def starting_tokens(tokenizer: PreTrainedTokenizerBase, length: int) -> list[int]:
    """Return the special tokens that every window of text starts with, such as BOS.

    A model expects them at the start of whatever it reads: without BOS, Gemma predicts much worse.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the text.
        length (`int`): tokens of a window, these included.

    Raises:
        ValueError: where a window has no token of the text.
    """
    start, _ = tokens_around(tokenizer)
    if len(start) >= length:
        raise ValueError(
            f"Windows of {length} tokens hold no text: each starts with {len(start)} special tokens of the tokenizer "
            f"({' '.join(tokenizer.convert_ids_to_tokens(start))}). Choose longer windows."
        )
    return start


def tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer writes before a text, such as BOS, and those that it writes after."""
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next((start for start in range(len(whole)) if whole[start : start + len(text)] == text), 0)
    return whole[:start], whole[start + len(text) :]


def _has_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether there are tokens that are not special; some families have special ones even without a file."""
    return not set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids)


def _check_packages(model_id: str | Path, files: dict[str, Path]) -> None:
    """Raise `ValueError` where a tokenizer can only be read with packages that are not installed."""
    binary = [name for name in files if name.endswith(".model")]
    if "tokenizer.json" in files or not binary:
        return
    name = binary[0]
    if name == "tiktoken.model" or _is_tiktoken(files[name]):
        needed = {"tiktoken": importlib.util.find_spec("tiktoken") is not None}
    else:
        needed = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    missing = [package for package, installed in needed.items() if not installed]
    if missing:
        raise ValueError(
            f"{model_id} has its tokenizer in {name}, which is read with {' and '.join(needed)}; "
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed. Install: pip install "
            f"{' '.join(missing)}; or {OTHERWISE}."
        )


def _is_tiktoken(file: Path) -> bool:
    with open(file, "rb") as lines:
        return TIKTOKEN_LINE.fullmatch(lines.readline(1000)) is not None
