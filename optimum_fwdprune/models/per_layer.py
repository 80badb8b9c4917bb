"""Mixins that turn a stock transformers class into one whose layers differ in size."""

import math
import sys
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

from .layout import ATTENTION, DecoderLayout
from .resizing import resize_layer


# Keys of a pruned config that its stock config does not have or must not inherit.
_NOT_STOCK = (
    "architectures",
    "attention_output_bias",
    "auto_map",
    "mlp_output_bias",
    "model_type",
    "per_layer_config",
    "quantization_config",
)


def stock_config_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Return the stock config class behind a pruned one."""
    return next(base for base in config_class.__bases__ if issubclass(base, PreTrainedConfig))


def stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the dense model that a pruned `config` was cut from, with the layers that are left.

    The parts of a multimodal config that are not pruned are those of `config` themselves.
    """
    config_class = stock_config_class(type(config))
    # A size that the stock config derives from others is a property of it, which nothing can set.
    derived = {
        key for base in config_class.__mro__ for key, value in vars(base).items() if isinstance(value, property)
    }
    values = {key: value for key, value in config.to_dict().items() if key not in derived.union(_NOT_STOCK)}
    text_config = config.get_text_config()
    if text_config is not config:
        values |= {key: getattr(config, key) for key in config.sub_configs}
        values["text_config"] = stock_config(text_config)
    stock = config_class.from_dict(values)
    take_implementations(stock, config)
    return stock


def take_implementations(config: PreTrainedConfig, source: PreTrainedConfig) -> None:
    """Set the implementations of attention and of experts in a config to those in the config of another model."""
    config._attn_implementation = attention_implementations(source)
    for own, other in ((config, source), (config.get_text_config(), source.get_text_config())):
        own._experts_implementation_internal = other._experts_implementation_internal


def attention_implementations(config: PreTrainedConfig) -> str | dict[str, str] | None:
    """Return the attention of a model, or where it has parts, of all its parts by name, as `from_pretrained` takes
    it."""
    if not config.sub_configs:
        return config._attn_implementation
    parts = {key: getattr(config, key) for key in config.sub_configs}
    return {
        "": config._attn_implementation,
        **{key: part._attn_implementation for key, part in parts.items() if part is not None},
    }


@dataclass(kw_only=True, repr=False)
class PerLayerConfigMixin:
    """First base of a pruned config class, in front of the stock config.

    The sizes at the top of a pruned config are those of the dense model, but for the number of layers, and
    `per_layer_config` has the sizes of every layer that is left, with the sublayers that it `skip`s. An
    attribute that has the same value in every layer is read from the config as that value; transformers raises
    `AmbiguousGlobalPerLayerAttributeError` for one that differs between layers.

    Args:
        attention_output_bias (`bool`, defaults to `False`): whether reconstruction gave the output projections of
            attention a bias that the stock family does not have.
        mlp_output_bias (`bool`, defaults to `False`): whether it gave the output projections of the MLPs one.
    """

    attention_output_bias: bool = False
    mlp_output_bias: bool = False

    def __post_init__(self, **kwargs):
        # Stock configs without a `head_dim` derive it from the number of heads, which no longer divides the hidden
        # size. Their own `__post_init__` makes that number a per-layer attribute, which cannot be read after it.
        head_dim = kwargs.pop("head_dim", None) or getattr(self, "head_dim", None)
        self.head_dim = head_dim or self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        """Return the values of a config; that of a dense model is one whose layers lost nothing."""
        values, unused = super().get_config_dict(*args, **kwargs)
        # PEFT reads the dense model's config with this class when it saves adapters, and transformers would warn.
        if values.get("model_type") == stock_config_class(cls).model_type:
            values["model_type"] = cls.model_type
        return values, unused

    def __getattribute__(self, key: str):
        try:
            return super().__getattribute__(key)
        except AmbiguousGlobalPerLayerAttributeError:
            first, *others = (getattr(layer_config, key) for layer_config in self.per_layer_config)
            if any(value != first for value in others):
                raise
            return first

    @property
    def kv_sharing_modes(self) -> list[str | None] | None:
        """For caches of transformers: `"reuse"` where a layer has no attention, so that nothing is stored for it, and
        `None` elsewhere. `None` altogether where every layer has attention."""
        modes = ["reuse" if ATTENTION in getattr(layer, "skip", ()) else None for layer in self.per_layer_config or ()]
        return modes if any(modes) else None

    # The stock checks read sizes that differ between layers here. They run on the dense sizes when the model is built,
    # in `stock_config`.
    def validate_architecture(self) -> None:
        """Check nothing: a pruned layer keeps its `head_dim`, whatever number of heads is left."""

    def validate_rope(self) -> None:
        """Check nothing: a pruned layer keeps its `head_dim`, and with it the rotary embeddings."""


class PerLayerMixin:
    """First base of a pruned model class, in front of the stock class that it shrinks.

    The stock class is built at its dense sizes (free on the meta device, which `from_pretrained` uses), then every
    decoder layer is resized to its entry in `config.per_layer_config`. A family sets two class attributes:

    - `config_class`: the pruned config, a `PerLayerConfigMixin` in front of the stock config;
    - `layout` (`DecoderLayout`): where its decoder layers keep their heads and channels.

    A class with several Auto classes, or one of another name, sets `auto_classes` too: their names, the usual one
    first.
    """

    layout: DecoderLayout
    auto_classes: tuple[str, ...]

    # How the model was pruned: an object with `save(folder)`, which writes files beside the weights. It is set where a
    # model is pruned or loaded, so that `save_pretrained` and `Trainer.save_model` write them.
    pruning_record = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if issubclass(cls, PreTrainedModel):
            # "PrunedLlamaForCausalLM" -> "AutoModelForCausalLM"; makes every save copy this file and write `auto_map`.
            _, is_task, task = cls.__name__.partition("For")
            if "auto_classes" not in vars(cls):
                cls.auto_classes = (f"AutoModel{is_task}{task}",)
            cls._auto_class = cls.auto_classes[0]
            cls.config_class._auto_class = "AutoConfig"

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        stock = stock_config(config)
        super().__init__(stock, *args, **kwargs)
        config.auto_map = self._auto_map()
        text_config = config.get_text_config()
        own_configs = {type(stock.get_text_config()): text_config, type(stock): config}
        for module in self.modules():
            # Parts of the model that are not pruned share their configs with `config`.
            if isinstance(module, PreTrainedModel) and type(module.config) in own_configs:
                own_config = own_configs[type(module.config)]
                for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
                    setattr(own_config, name, getattr(module.config, name))
                module.config = own_config
        for layer, layer_config in zip(self.decoder_layers, text_config.per_layer_config, strict=True):
            # Attention and experts read their implementation from the one config that `set_attn_implementation` and
            # `set_experts_implementation` change.
            for module in layer.modules():
                if hasattr(module, "config"):
                    module.config = text_config
            resize_layer(layer, self.layout, layer_config)
            layer.apply(self._init_weights)

    @property
    def decoder_layers(self) -> nn.ModuleList:
        return self.base_model.get_submodule(self.layout.layers)

    def save_pretrained(self, save_directory, is_main_process=True, **kwargs):
        # The parts of some multimodal models would be written under the names that older versions gave them.
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        # With adapters inside, adapters alone are saved.
        if self.pruning_record is not None and is_main_process and not getattr(self, "_hf_peft_config_loaded", False):
            self.pruning_record.save(save_directory)

    def set_attn_implementation(self, *args, **kwargs):
        super().set_attn_implementation(*args, **kwargs)
        # A family whose attention reads sizes from its config binds it to the layer's own, which is a copy.
        for module in self.decoder_layers.modules():
            if hasattr(module, "config"):
                implementation = self.config.get_text_config()._attn_implementation_internal
                module.config._attn_implementation_internal = implementation

    @classmethod
    def maybe_distribute_model(cls, model, *args, **kwargs):
        """Split a model over devices, as `from_pretrained` does with a `distributed_config`.

        Raises:
            ValueError: where tensor parallelism would split the keys of one KV head over devices.
        """
        model = super().maybe_distribute_model(model, *args, **kwargs)
        check_shared_heads(model)
        return model

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks for the attention in the file of the class, and that of a pruned class has none.
        return cls._stock_class()._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # The same for experts.
        return cls._stock_class()._can_set_experts_implementation()

    @classmethod
    def _stock_class(cls) -> type[PreTrainedModel]:
        # Loading as remote code may add a mixin of transformers after the stock class.
        bases = (base for base in cls.__mro__ if issubclass(base, PreTrainedModel))
        return next(base for base in bases if not issubclass(base, PerLayerMixin))

    @classmethod
    def _auto_map(cls) -> dict[str, str]:
        """Return `auto_map` with every task class in this family's file, so that all of them load as remote code."""
        file = cls.__module__.rpartition(".")[2]
        classes = [
            value
            for value in vars(sys.modules[cls.__module__]).values()
            if isinstance(value, type) and issubclass(value, PerLayerMixin) and issubclass(value, PreTrainedModel)
        ]
        config_file = cls.config_class.__module__.rpartition(".")[2]
        return {
            "AutoConfig": f"{config_file}.{cls.config_class.__name__}",
            **{name: f"{file}.{value.__name__}" for value in classes for name in value.auto_classes},
        }


def check_shared_heads(model: PreTrainedModel) -> None:
    """Raise `ValueError` where the devices of tensor parallelism cannot share the KV heads of every layer equally.

    Transformers splits the rows of the projections whatever they hold, and the attention would fail in the first
    forward pass at the shape of its keys.

    Args:
        model (`PreTrainedModel`): a pruned model that transformers has split.
    """
    attention, devices = model.layout.attention, getattr(model, "_tp_size", None) or 1
    keys = attention.fused or attention.key
    styles = {style for name, style in (model.tp_plan or {}).items() if name.rpartition(".")[2] == keys}
    # Outputs that are gathered may be split anywhere.
    if devices == 1 or "colwise" not in styles:
        return
    count_key = attention.kv_heads_key or attention.heads_key
    counts = {
        number: getattr(layer, count_key)
        for number, layer in enumerate(model.config.get_text_config().per_layer_config)
        if ATTENTION not in getattr(layer, "skip", ())
    }
    common = math.gcd(*counts.values())
    for number, count in counts.items():
        if count % devices:
            possible = [str(divisor) for divisor in range(1, common + 1) if common % divisor == 0]
            raise ValueError(
                f"Tensor parallelism splits every layer over {devices} devices, and layer {number} has {count} KV "
                f"heads, which {devices} does not divide. Numbers of devices that divide those of all layers: "
                f"{', '.join(possible)}. Load it on so many, or prune the dense model with tensor_parallel={devices}."
            )
