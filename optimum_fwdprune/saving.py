"""What a checkpoint is made of, written as it is in memory, and checked before there is anything to lose."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from .loggers import get_logger
from .utils import DiskFullError, naming_what_is_full


logger = get_logger(__name__)


def check_savable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise `ValueError` where `save_pretrained` would fail on a config, a generation config or a tokenizer.

    They are written to a temporary folder, which takes a fraction of a second; weights are not.

    Args:
        model (`PreTrainedModel`): dense or pruned.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): saved beside it.
    """
    _check_generation_config(model)
    with tempfile.TemporaryDirectory(prefix="fwdprune-") as folder:
        try:
            with naming_what_is_full(Path(folder)):
                _write_all_but_weights(model, tokenizer, folder)
        except DiskFullError as error:
            # The checkpoint goes elsewhere.
            logger.info("Not checked whether the config and the tokenizer can be saved: %s", error)


def _write_all_but_weights(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str) -> None:
    try:
        model.config.save_pretrained(folder)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"The model's config cannot be saved ({' '.join(str(error).split())}). Mend model.config first."
        ) from error
    if tokenizer is None:
        return
    try:
        with naming_what_is_full(Path(folder)):
            tokenizer.save_pretrained(folder)
    except DiskFullError:
        raise
    except Exception as error:  # Whatever a tokenizer's own code raises, it cannot be saved.
        raise ValueError(
            f"The tokenizer, a {type(tokenizer).__name__}, cannot be saved ({type(error).__name__}: "
            f"{' '.join(str(error).split())}). Use one that can be, or none: FwdPruner(model, tokenizer=None)."
        ) from error


@contextmanager
def generation_config_as_it_is(model: Any, folder: str | Path) -> Iterator[None]:
    """Have what the block saves in `folder` hold the model's generation config, value by value.

    Many published generation configs name a `temperature` without `do_sample`. Transformers loads them, and refuses
    to save them as soon as any value was changed.

    Args:
        model (`PreTrainedModel`): it has a valid stand-in while the block runs, and its own object afterwards.
        folder (`str` or `Path`): where the block saves the model.

    Raises:
        ValueError: where the config could not be loaded again.
    """
    kept: GenerationConfig | None = getattr(model, "generation_config", None)
    if kept is None or _is_valid(kept):
        yield
        return
    _check_generation_config(model)
    model.generation_config = type(kept)()
    try:
        yield
    finally:
        model.generation_config = kept
    if (file := Path(folder) / GENERATION_CONFIG_NAME).exists():
        kept.to_json_file(file, use_diff=True, keys_to_pop=["compile_config"])


def _is_valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def _check_generation_config(model: PreTrainedModel) -> None:
    config: GenerationConfig | None = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.validate()
    except ValueError as error:
        raise ValueError(
            f"The model's generation config would not load again ({' '.join(str(error).split())}). Mend "
            f"model.generation_config first."
        ) from error
