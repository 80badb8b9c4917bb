"""The registry of model families, keyed by `config.model_type`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..models.adapter_defaults import add_adapter_defaults
from ..models.families import causal_class_name, family_modules, import_family
from ..models.layout import SUBLAYERS, DecoderLayout
from ..models.per_layer import stock_config_class
from ..request.choices import AttentionUnit, UnitKind
from ..runs.loggers import get_logger
from .depth import layers_left, skipped_sublayers, sublayers_left, windows_of
from .site import Site, keyed_by_site
from .sites import attention_site, attention_sizes, check_couplings, site_after_attention
from .support import Support, support_of
from .wrapping import check_no_adapters


logger = get_logger(__name__)


@dataclass(frozen=True)
class Architecture:
    """A model family. Its pruned classes declare everything that the package needs, such as the layout.

    Args:
        model_classes (`tuple[type, ...]`): the pruned classes, one per task, with the base classes `PerLayerMixin` and
            the stock class.
    """

    model_classes: tuple[Any, ...]

    @classmethod
    def from_module(cls, module: ModuleType) -> Architecture:
        """Return an architecture with all pruned classes that `module` defines."""
        return cls(
            tuple(
                value
                for value in vars(module).values()
                if isinstance(value, type)
                and issubclass(value, PreTrainedModel)
                and value.__module__ == module.__name__
            )
        )

    @property
    def layout(self) -> DecoderLayout:
        """The layout of heads and channels in the decoder layers."""
        return self.model_classes[0].layout

    @property
    def model_type(self) -> str:
        """`config.model_type` of the stock family."""
        return stock_config_class(self.config_class).model_type

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        """The pruned config class."""
        return self.model_classes[0].config_class

    def pruned_text_type(self, text_config: PreTrainedConfig) -> str:
        """Return the pruned `model_type` of the language model of a multimodal family, by its config.

        Raises:
            ValueError: where language models of this type cannot be pruned inside the family.
        """
        text_classes: Any = vars(self.config_class)["text_config_classes"]
        for text_class in text_classes:
            if text_config.model_type in (text_class.model_type, stock_config_class(text_class).model_type):
                return text_class.model_type
        supported = ", ".join(stock_config_class(text_class).model_type for text_class in text_classes)
        raise ValueError(
            f"The language model of this {self.model_type} is of type {text_config.model_type!r}, which cannot be "
            f"pruned inside it. Supported are {supported}."
        )

    @property
    def support(self) -> dict[str, Support]:
        """Whether the models of the family can be pruned in a way; see [`support_of`]."""
        return support_of(self.layout)

    @property
    def stores_experts_apart(self) -> bool:
        """Whether stock checkpoints of the family hold one tensor per expert, and its stock classes one for all."""
        return self.layout.experts is not None

    def pruned_class(self, model: PreTrainedModel) -> type[PreTrainedModel]:
        """Return the pruned class for the task of `model`, dense or pruned."""
        if (text_config := model.config.get_text_config()) is not model.config:
            self.pruned_text_type(text_config)
        pruned = is_pruned(model.config)
        for candidate in self.model_classes:
            stock = candidate.__bases__[-1]
            # The code in a checkpoint defines classes with the same names.
            if type(model).__name__ == candidate.__name__ if pruned else type(model) is stock:
                return candidate
        supported = ", ".join(sorted(candidate.__bases__[-1].__name__ for candidate in self.model_classes))
        raise ValueError(
            f"{type(model).__name__} has no pruned counterpart. Load the checkpoint as one of {supported}, or "
            f"register an architecture for {self.model_type!r} whose model_classes include it."
        )

    def layers(self, model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
        """Return the decoder layers of `model` with their names inside the model."""
        container: Any = model.base_model.get_submodule(self.layout.layers)
        name = next(name for name, module in model.named_modules() if module is container)
        return [(f"{name}.{index}", layer) for index, layer in enumerate(container)]

    def sites(self, model: PreTrainedModel, attention_unit: str = AttentionUnit.QUERY_HEAD) -> list[Site]:
        """Return every site of `model`, layer by layer, attention before MLP. Removed sublayers have no site."""
        if attention_unit not in list(AttentionUnit):
            raise ValueError(f"attention_unit must be one of {', '.join(AttentionUnit)}; got {attention_unit!r}.")
        check_no_adapters(model, "cannot be cut")
        _check_layer_count(model, len(self.layers(model)))
        sites, skipped, config = [], skipped_sublayers(model.config), model.config.get_text_config()
        for index, (path, layer) in enumerate(self.layers(model)):
            try:
                if (index, UnitKind.ATTENTION) not in skipped:
                    attention = attention_site(self.layout.attention, index, path, layer, attention_unit)
                    sites.append(replace(attention, fixed=self.layout.attention.fixed))
                if (index, UnitKind.MLP) not in skipped:
                    sites.append(site_after_attention(self.layout, config, index, path, layer))
            except AttributeError as error:
                raise ValueError(
                    f"{path} of this {type(model).__name__} is not built like a decoder layer of {self.model_type}: "
                    f"{error}. Restore the modules that were replaced in it, or load the model again."
                ) from error
        first_layers, windows = self.layout.first_layers(model.config), windows_of(model.config)
        check_couplings(sites)
        return [
            replace(
                site,
                layer_stays=site.layer < first_layers,
                window=windows[site.layer] if site.kind == UnitKind.ATTENTION else None,
            )
            for site in sites
        ]

    def layer_sizes(self, model: PreTrainedModel, sites: list[Site], kept: dict) -> dict[int, dict]:
        """Return `per_layer_config` of the model that keeps the units `kept` (site key -> unit indices). Layers
        without a unit are left out, and the others are renumbered."""
        layers = [layer for _, layer in self.layers(model)]
        sizes: dict[int, dict] = {index: {} for index in range(len(layers))}
        for site in sites:
            units = kept[site.key]
            if units and site.kind == UnitKind.ATTENTION:
                sizes[site.layer] |= attention_sizes(self.layout.attention, layers[site.layer], site, units)
            elif units and site.routing is None and self.layout.mlp is not None:
                sizes[site.layer][self.layout.mlp.width_key] = len(units)
        left = sublayers_left(keyed_by_site(kept))
        for index, of_layer in sizes.items():
            if skipped := sorted(kind for kind in SUBLAYERS if (index, kind) not in left):
                of_layer["skip"] = skipped
        return {number: sizes[index] for number, index in enumerate(layers_left(kept))}


def _check_layer_count(model: PreTrainedModel, layers: int) -> None:
    """Raise `ValueError` where the number of decoder layers of `model` is not the one in its config."""
    expected = model.config.get_text_config().num_hidden_layers
    if layers != expected:
        raise ValueError(
            f"config.num_hidden_layers is {expected}, and this {type(model).__name__} has {layers} decoder layers. "
            f"Set model.config.num_hidden_layers = {layers} and the entries of the config that are lists by layer, or "
            f"load the whole model again."
        )


_ARCHITECTURES: dict[str, Architecture] = {}


def register_architecture(architecture: Architecture) -> None:
    """Register a model family with the pruner, and its pruned classes with transformers' Auto classes.

    Args:
        architecture (`Architecture`): the family; one with the same `model_type` is replaced.

    Raises:
        ValueError: where a class lacks a layout, which loading a pruned checkpoint needs.
    """
    for model_class in architecture.model_classes:
        if not hasattr(model_class, "layout"):
            raise ValueError(
                f"{model_class.__name__} lacks a layout. Add optimum_fwdprune.models.per_layer.PerLayerMixin as a "
                f"base class before its stock class, and set its attribute layout to the DecoderLayout of the family."
            )
    _ARCHITECTURES[architecture.model_type] = architecture
    _ARCHITECTURES[architecture.config_class.model_type] = architecture
    AutoConfig.register(architecture.config_class.model_type, architecture.config_class, exist_ok=True)
    for model_class in architecture.model_classes:
        for name in model_class.auto_classes:
            # Older versions of transformers lack some.
            if (auto_class := getattr(transformers, name, None)) is not None:
                auto_class.register(architecture.config_class, model_class, exist_ok=True)
    add_adapter_defaults(architecture.model_type, architecture.config_class.model_type)


def pruned_types() -> dict[str, str]:
    """Return the `model_type` of every family that is registered so far, with the one of its pruned config."""
    return {architecture.model_type: architecture.config_class.model_type for architecture in _ARCHITECTURES.values()}


def registered_architectures() -> list[Architecture]:
    """Return all families by name, and import those that are not imported yet. A family that cannot be imported with
    the installed transformers is left out with a warning."""
    architectures = []
    for model_type in supported_architectures():
        try:
            architectures.append(_architecture_of(model_type))
        except ValueError as error:
            logger.warning("%s", error)
    return [architecture for architecture in architectures if architecture is not None]


def supported_architectures() -> list[str]:
    """Return the `model_type`s of all families, without those of pruned configs. No family is imported."""
    return sorted({*pruned_types(), *family_modules()})


def causal_class_names() -> list[str]:
    """Return the names of the pruned causal language models of all families. No family is imported."""
    registered = {
        model_class.__name__
        for architecture in _ARCHITECTURES.values()
        for model_class in architecture.model_classes
        if model_class._auto_class == "AutoModelForCausalLM"
    }
    return sorted(registered.union(filter(None, map(causal_class_name, family_modules()))))


def is_supported(config: PreTrainedConfig) -> bool:
    """Return whether `config` is that of a dense or pruned model of a supported family."""
    return _architecture_of(config.model_type) is not None


def is_pruned(config: PreTrainedConfig) -> bool:
    """Return whether `config` is that of a pruned model of a registered family, also if the model was loaded with the
    code in its checkpoint (`trust_remote_code=True`)."""
    architecture = _architecture_of(config.model_type)
    if architecture is None:
        return False
    pruned_class = architecture.config_class
    return (type(config).__name__, config.model_type) == (pruned_class.__name__, pruned_class.model_type)


def get_architecture(config: PreTrainedConfig) -> Architecture:
    """Return the architecture of `config`. A family of this package is imported when it is first needed.

    Raises:
        ValueError: where `config.model_type` is not supported, or not with the installed transformers.
    """
    architecture = _architecture_of(config.model_type)
    if architecture is None:
        raise ValueError(
            f"model_type {config.model_type!r} is not supported. Supported: {', '.join(supported_architectures())}. "
            f"Other families can be added with optimum_fwdprune.register_architecture: optimum-cli fwdprune inspect "
            f"MODEL prints a declaration to start from, and docs/contributing/add_an_architecture.md explains it."
        )
    if config.get_text_config().is_heterogeneous and not is_pruned(config):
        raise ValueError(
            f"This {config.model_type!r} config has per-layer sizes of another tool in per_layer_config, which "
            f"transformers' {config.model_type} classes ignore, so that the weights do not have these sizes. Load the "
            f"checkpoint with the tool that wrote it, or remove per_layer_config if all layers have the same size."
        )
    return architecture


def _architecture_of(model_type: str) -> Architecture | None:
    """Return the family of a `model_type`, stock or pruned, or `None` where it is not supported."""
    if model_type not in _ARCHITECTURES:
        try:
            import_family(model_type)
        except ImportError as error:
            raise ValueError(
                f"Models of type {model_type!r} cannot be pruned with transformers {transformers.__version__}, which "
                f"lacks the modules that their pruned classes need ({error}). Install a newer transformers."
            ) from error
    return _ARCHITECTURES.get(model_type)


def find_sites(
    model: PreTrainedModel, attention_unit: str = AttentionUnit.QUERY_HEAD, kinds: tuple[str, ...] = tuple(UnitKind)
) -> list[Site]:
    """Return the sites of `model` that are of one of the `kinds`, layer by layer.

    Args:
        model (`PreTrainedModel`): a supported model, dense or pruned.
        attention_unit (`str`, defaults to `"query_head"`): `"query_head"` or `"kv_group"`, which are the same if all
            heads have their own keys and values.
        kinds (`tuple[str, ...]`, defaults to both): any of `"attention"` and `"mlp"`.
    """
    sites = get_architecture(model.config).sites(model, attention_unit)
    return [site for site in sites if site.kind in kinds]
