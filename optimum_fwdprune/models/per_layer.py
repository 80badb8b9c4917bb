"""What turns a stock transformers class into one whose layers differ in size."""

import sys

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError


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


def stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the stock config of the dense model that a pruned `config` was cut from."""
    stock_class = next(base for base in type(config).__bases__ if issubclass(base, PreTrainedConfig))
    values = {key: value for key, value in config.to_dict().items() if key not in _NOT_STOCK}
    stock = stock_class.from_dict(values)
    stock._attn_implementation = config._attn_implementation
    return stock


class PerLayerConfigMixin:
    """First base of a pruned config class, in front of the stock config.

    The sizes at the top of a pruned config are those of the dense model, and `per_layer_config` has those of each
    layer. An attribute that has the same value in every layer is read from the config as that value; transformers
    raises `AmbiguousGlobalPerLayerAttributeError` for one that differs between layers.
    """

    def __getattribute__(self, key: str):
        try:
            return super().__getattribute__(key)
        except AmbiguousGlobalPerLayerAttributeError:
            first, *others = (getattr(layer_config, key) for layer_config in self.per_layer_config)
            if any(value != first for value in others):
                raise
            return first

    # The stock checks read sizes that differ between layers here. They run on the dense sizes when the model is built,
    # by `stock_config`.
    def validate_architecture(self) -> None:
        """Nothing to check: a pruned layer keeps its `head_dim`, whatever number of heads is left."""

    def validate_rope(self) -> None:
        """Nothing to check: a pruned layer keeps its `head_dim`, and with it the rotary embeddings."""


class PerLayerMixin:
    """First base of a pruned model class, in front of the stock class that it shrinks.

    The stock class is built at its dense sizes (free on the meta device, which `from_pretrained` uses), then every
    decoder layer is resized to its entry in `config.per_layer_config`. A family sets three class attributes:

    - `config_class`: the pruned config, whose first base is the stock config;
    - `layers_path` (`str`): where the base model keeps its decoder layers;
    - `resize` (`staticmethod(layer, layer_config)`): replaces the linears of one layer by empty ones of its sizes.
    """

    layers_path: str = "layers"

    # How the model was pruned: an object with `save(folder)`, which writes files beside the weights. Whoever prunes or
    # loads the model sets it, so that it is kept where `Trainer.save_model` or a user saves the model.
    pruning_record = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if issubclass(cls, PreTrainedModel):
            # "PrunedLlamaForCausalLM" -> "AutoModelForCausalLM"; makes every save copy this file and write `auto_map`.
            _, is_task, task = cls.__name__.partition("For")
            cls._auto_class = f"AutoModel{is_task}{task}"
            cls.config_class._auto_class = "AutoConfig"

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        stock = stock_config(config)
        super().__init__(stock, *args, **kwargs)
        config._attn_implementation_internal = stock._attn_implementation_internal
        config.auto_map = self._auto_map()
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.config = config
        for layer, layer_config in zip(self.decoder_layers, config.per_layer_config, strict=True):
            # Attention reads its implementation from the one config that `set_attn_implementation` changes.
            for module in layer.modules():
                if hasattr(module, "config"):
                    module.config = config
            self.resize(layer, layer_config)
            layer.apply(self._init_weights)

    @property
    def decoder_layers(self) -> nn.ModuleList:
        return self.base_model.get_submodule(self.layers_path)

    def save_pretrained(self, save_directory, is_main_process=True, **kwargs):
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        # With adapters inside, adapters alone are saved.
        if self.pruning_record is not None and is_main_process and not getattr(self, "_hf_peft_config_loaded", False):
            self.pruning_record.save(save_directory)

    def set_attn_implementation(self, *args, **kwargs):
        super().set_attn_implementation(*args, **kwargs)
        # A family whose attention reads sizes from its config binds it to the layer's own, which is a copy.
        for module in self.decoder_layers.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation_internal = self.config._attn_implementation_internal

    @classmethod
    def _auto_map(cls) -> dict[str, str]:
        """`auto_map` of every task class in this family's file, so that each of them loads as remote code."""
        file = cls.__module__.rpartition(".")[2]
        classes = [
            value
            for value in vars(sys.modules[cls.__module__]).values()
            if isinstance(value, type) and issubclass(value, PerLayerMixin) and issubclass(value, PreTrainedModel)
        ]
        config_file = cls.config_class.__module__.rpartition(".")[2]
        return {
            "AutoConfig": f"{config_file}.{cls.config_class.__name__}",
            **{value._auto_class: f"{file}.{value.__name__}" for value in classes},
        }


def resize_linear(
    parent: nn.Module,
    name: str,
    *,
    in_features: int | None = None,
    out_features: int | None = None,
    add_bias: bool = False,
) -> None:
    """Replace the linear `parent.name` by an empty one of the given sizes on the same device and in the same dtype."""
    old = getattr(parent, name)
    new = nn.Linear(
        old.in_features if in_features is None else in_features,
        old.out_features if out_features is None else out_features,
        bias=old.bias is not None or add_bias,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    setattr(parent, name, new)


def resize_llama_layer(layer: nn.Module, config: PreTrainedConfig) -> None:
    """Resize a decoder layer with LLaMA's module names (LLaMA, Mistral, Qwen2, Qwen3)."""
    attention, mlp = layer.self_attn, layer.mlp
    query_features = config.num_attention_heads * attention.head_dim
    key_features = config.num_key_value_heads * attention.head_dim
    resize_linear(attention, "q_proj", out_features=query_features)
    resize_linear(attention, "k_proj", out_features=key_features)
    resize_linear(attention, "v_proj", out_features=key_features)
    resize_linear(attention, "o_proj", in_features=query_features, add_bias=config.attention_output_bias)
    attention.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads

    resize_linear(mlp, "gate_proj", out_features=config.intermediate_size)
    resize_linear(mlp, "up_proj", out_features=config.intermediate_size)
    resize_linear(mlp, "down_proj", in_features=config.intermediate_size, add_bias=config.mlp_output_bias)
    mlp.intermediate_size = config.intermediate_size
