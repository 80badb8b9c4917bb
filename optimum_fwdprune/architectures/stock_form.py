"""The stock class that holds the weights of a pruned model: of its own family, or of one that computes the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..models.per_layer import stock_config
from .depth import skipped_sublayers


# Families whose stock classes are equivalent, in the order in which they are tried. They may allow sizes that the
# family's own class does not: Mistral's config allows any number of heads of any width.
SAME_COMPUTATION = {"llama": ("llama", "mistral")}


# Values with which the config of another family is equivalent.
VALUES_OF_OTHERS = {"mistral": {"sliding_window": None}}


def stock_form(config: PreTrainedConfig, pruned_class: type[PreTrainedModel]) -> tuple[PreTrainedConfig, Any]:
    """Return the stock config and class that hold the weights of a pruned model.

    Args:
        config (`PreTrainedConfig`): the config of the pruned model.
        pruned_class (`type`): its class.

    Raises:
        ValueError: where there are none; the message names the reasons and the alternatives.
    """
    try:
        return find_stock_form(config, pruned_class)
    except NoStockForm as error:
        raise ValueError(
            f"{error} Load the checkpoint with trust_remote_code=True instead, or prune the model with "
            f"layout='stock', which keeps to sizes of stock checkpoints."
        ) from error


class NoStockForm(ValueError):
    """No stock class can hold a pruned model; the message has the reasons."""


def find_stock_form(config: PreTrainedConfig, pruned_class: type[PreTrainedModel]) -> tuple[PreTrainedConfig, Any]:
    """Return what `stock_form` returns.

    Raises:
        NoStockForm: where no stock class can hold the weights.
        ValueError: where the config is that of a dense model, or layers differ in size.
    """
    text_config = config.get_text_config()
    if "per_layer_config" not in text_config.to_dict():
        raise ValueError(
            f"This {config.model_type} model was not pruned by this package: unmodified transformers loads it."
        )
    dense = stock_config(text_config)
    if skipped := sorted(skipped_sublayers(config)):
        layer, kind = skipped[0]
        raise ValueError(
            f"A stock checkpoint has attention and MLP in every layer, and layer {layer} of this {config.model_type} "
            f"has no {kind}. Remove whole layers (kinds=['layer']) instead of sublayers, or load it with the plugin."
        )
    # Keys that only a pruned config has are compared by the shapes below.
    known = type(dense)().to_dict()
    layers = [{key: value for key, value in entry.items() if key in known} for entry in _entries(text_config)]
    for number, entry in enumerate(layers):
        if differing := [key for key in entry if entry[key] != layers[0][key]]:
            key = differing[0]
            raise ValueError(
                f"A stock checkpoint has layers of one size, and layer {number} has {key}={entry[key]}, whereas layer "
                f"0 has {layers[0][key]}. Prune with layout='stock' (--layout stock), or load it with the plugin."
            )
    shapes = _shapes(config, pruned_class)
    reasons = []
    for candidate, reason in _candidates(dense, layers[0]):
        if candidate is None:
            reasons.append(reason)
            continue
        if text_config is not config:
            # The model around the language model is one of its own family.
            whole = stock_config(config)
            whole.text_config = candidate
            candidate = whole
        model_class = _class_for(candidate, pruned_class)
        if model_class is None:
            reasons.append(f"{candidate.model_type} has no class for {pruned_class.__name__}")
            continue
        if (difference := _first_difference(shapes, _shapes(candidate, model_class))) is None:
            return candidate, model_class
        reasons.append(f"a stock {candidate.model_type} {difference}")
    raise NoStockForm(f"No stock checkpoint can hold this {config.model_type}: {'; '.join(reasons)}.")


def _entries(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return the values of every layer for all keys in which layers differ. `per_layer_config` has only values that
    differ from those of the config itself."""
    written: dict[str, dict] = config.to_dict()["per_layer_config"]
    keys = sorted({key for entry in written.values() for key in entry})
    return [{key: getattr(layer, key) for key in keys} for layer in config.per_layer_config]


def _candidates(dense: PreTrainedConfig, layer: dict[str, Any]) -> Iterator[tuple[PreTrainedConfig | None, str]]:
    """Yield stock configs with the sizes of `layer`, or `None` and the reason where a config does not allow them."""
    for model_type in SAME_COMPUTATION.get(dense.model_type, (dense.model_type,)):
        config_class = type(AutoConfig.for_model(model_type))
        values = {key: value for key, value in dense.to_dict().items() if key not in ("model_type", "architectures")}
        try:
            others = {} if model_type == dense.model_type else VALUES_OF_OTHERS.get(model_type, {})
            yield config_class.from_dict({**values, **layer, **others}), ""
        except Exception as error:  # Configs raise many classes of errors for sizes that they do not allow.
            yield None, f"{model_type} does not allow these sizes ({' '.join(str(error).split())})"


def _class_for(config: PreTrainedConfig, pruned_class: type[PreTrainedModel]) -> Any:
    """Return the stock class of a config's family for the task of a pruned class."""
    auto_class: Any = getattr(transformers, str(pruned_class._auto_class))
    return auto_class._model_mapping.get(type(config), None)


def _shapes(config: PreTrainedConfig, model_class: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = model_class(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _first_difference(wanted: dict[str, tuple[int, ...]], held: dict[str, tuple[int, ...]]) -> str | None:
    """Return a description of the first parameter of a stock model that differs from the pruned model, or `None`."""
    for name in {**wanted, **held}:
        if wanted.get(name) != held.get(name):
            have = f"{' x '.join(map(str, held[name]))}" if name in held else "nothing"
            want = f"{' x '.join(map(str, wanted[name]))}" if name in wanted else "nothing"
            return f"has {have} at {name} where the pruned model has {want}"
    return None
