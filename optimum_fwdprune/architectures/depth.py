"""Removed layers and sublayers of a model: the sublayers that it skips, and the entries of its config by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from .site import SiteKey


# Keys of configs with one entry per layer.
LISTS_BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "indexer_types")

# Keys of configs with indices of layers.
LISTS_OF_LAYERS = ("mlp_only_layers", "moe_layers")

# Keys of configs with the number of first layers that differ from those after them.
NUMBERS_OF_FIRST_LAYERS = ("first_k_dense_replace", "max_window_layers")

# Keys of configs with an interval of layers that differ from the others. They depend on the numbers of layers.
INTERVALS = ("decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step")


# Types of layers whose attention reaches a limited number of tokens back, with the config key of this number.
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


def layer_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return the config of every decoder layer of a model, dense or pruned."""
    config = config.get_text_config()
    # In transformers 5.14, a config whose layers are equal has no entries per layer.
    return list(config.per_layer_config or [config] * config.num_hidden_layers)


def skipped_sublayers(config: PreTrainedConfig) -> set[SiteKey]:
    """Return the keys of sites that were removed from layers of a pruned model."""
    return {
        SiteKey(number, kind)
        for number, layer in enumerate(layer_configs(config))
        for kind in getattr(layer, "skip", ())
    }


def windows_of(config: PreTrainedConfig) -> list[int | None]:
    """Return how many tokens the attention of every decoder layer of a model reaches back; `None` where it reaches all
    tokens, and everywhere in a model whose layers do not differ in this."""
    config = config.get_text_config()
    types = getattr(config, "layer_types", None) or ()
    windows = [getattr(config, WINDOWS[kind], None) if kind in WINDOWS else None for kind in types]
    return windows if len(set(windows)) > 1 else [None] * config.num_hidden_layers


def layers_left(kept: Mapping[SiteKey, Sequence[int]]) -> list[int]:
    """Return the layers that are kept if the sites of a model keep the units `kept`: those with a unit."""
    return sorted({layer for (layer, _), units in kept.items() if len(units)})


def sublayers_left(kept: Mapping[SiteKey, Sequence[int]]) -> set[SiteKey]:
    """Return the sublayers that are kept if the sites of a model keep the units `kept`: `(3, "mlp")` is the MLP of
    layer 3, or the mixture of experts in its place."""
    return {SiteKey(key.layer, key.sublayer) for key, units in kept.items() if len(units)}


def values_of_layers(config: PreTrainedConfig, left: Iterable[int]) -> dict[str, Any]:
    """Return the entries of a config with the number of layers or with indices of layers, for the layers `left`.

    Args:
        config (`PreTrainedConfig`): the config of the model with all its layers.
        left (iterable of `int`): the kept layers, in their order.

    Raises:
        ValueError: where an entry of the config cannot be changed accordingly.
    """
    left = list(left)
    values, total = config.to_dict(), config.num_hidden_layers
    changed: dict[str, Any] = {config.attribute_map.get("num_hidden_layers", "num_hidden_layers"): len(left)}
    if len(left) == total:
        return changed
    for key in INTERVALS:
        if values.get(key) not in (None, 1):
            raise ValueError(
                f"config.{key} is {values[key]}, an interval between layers that differ from the others, so that no "
                f"whole layer can be removed. Remove sublayers, heads or channels instead."
            )
    for key in LISTS_BY_LAYER:
        if values.get(key):
            changed[key] = [values[key][layer] for layer in left]
    for key in LISTS_OF_LAYERS:
        if values.get(key):
            changed[key] = [number for number, layer in enumerate(left) if layer in values[key]]
    for key in NUMBERS_OF_FIRST_LAYERS:
        if values.get(key):
            changed[key] = sum(layer < values[key] for layer in left)
    return changed
