"""The config of a pruned model: that of a pruned class, or of the stock class where this can hold what is left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from ..architectures import SiteKey, is_pruned, layers_left
from ..architectures.depth import sublayers_left, values_of_layers
from ..architectures.experts import values_of_experts
from ..loading.subject import Subject
from ..models.layout import SUBLAYERS
from ..models.per_layer import take_implementations
from ..request.choices import UnitKind


def pruned_config(subject: Subject, kept: Mapping[SiteKey, list[int]], with_bias: set[str]) -> PreTrainedConfig:
    """Build the config of the pruned model.

    Args:
        subject (`Subject`): the dense model with all its sites.
        kept (mapping of site key to `list[int]`): the units that the sites keep.
        with_bias (`set[str]`): kinds of sites whose projections get a bias that the family does not have.
    """
    model, architecture = subject.model, subject.architecture
    values = _values_of(subject.text_config)
    # A second pruning keeps the biases that the first one added.
    values["attention_output_bias"] = values.get("attention_output_bias", False) or UnitKind.ATTENTION in with_bias
    values["mlp_output_bias"] = values.get("mlp_output_bias", False) or UnitKind.MLP in with_bias
    values |= _values_after(subject, kept)
    values["per_layer_config"] = architecture.layer_sizes(model, subject.sites, dict(kept))
    if subject.text_config is not model.config:
        text_config = {**values, "model_type": architecture.pruned_text_type(subject.text_config)}
        values = _values_of(model.config) | {"text_config": text_config}
    values["architectures"] = [architecture.pruned_class(model).__name__]
    config = architecture.config_class.from_dict(values)
    take_implementations(config, model.config)
    config._name_or_path = model.config._name_or_path
    return config


def stock_pruned_config(subject: Subject, kept: Mapping[SiteKey, list[int]]) -> PreTrainedConfig:
    """Build the config of a pruned model that a stock class holds: fewer experts, and fewer layers."""
    model, text_config = subject.model, subject.text_config
    values = _values_of(text_config) | _values_after(subject, kept)
    if text_config is not model.config:
        values = _values_of(model.config) | {"text_config": {**values, "model_type": text_config.model_type}}
    config = type(model.config).from_dict(values)
    take_implementations(config, model.config)
    config._name_or_path = model.config._name_or_path
    return config


def stays_stock(subject: Subject, kept: Mapping[SiteKey, list[int]]) -> bool:
    """Return whether the pruned model has the stock class of the dense one: where it loses whole layers or experts,
    but no heads, channels or sublayers."""
    if is_pruned(subject.model.config):
        return False
    losing, left = subject.losing(kept), layers_left(kept)
    # A model that loses nothing is built as a pruned one, whose layers are checked before anything is measured.
    loses = bool(losing) or len(left) < len(subject.layers)
    whole_layers = len(sublayers_left(kept)) == len(SUBLAYERS) * len(left)
    return loses and all(site.routing is not None for site in losing) and whole_layers


def _values_after(subject: Subject, kept: Mapping[SiteKey, list[int]]) -> dict[str, Any]:
    """Return the entries of the config with numbers of layers and of experts."""
    config, layout = subject.text_config, subject.architecture.layout
    return values_of_layers(config, layers_left(kept)) | values_of_experts(layout, config, kept)


def _values_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the values of a config that a pruned one takes over."""
    own = ("model_type", "per_layer_config", "auto_map", "quantization_config", "transformers_version")
    return {key: value for key, value in config.to_dict().items() if key not in own}
