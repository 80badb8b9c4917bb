"""What llama.cpp's code can hold of every family, in GGUF files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


# Config keys of the activation of the MLP.
ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation")

# The last one of every so many layers has no rotary embeddings in llama.cpp's smollm3.
PERIOD_WITHOUT_ROPE = 4

# From so many layers on, llama.cpp's command-r normalizes queries and keys.
LAYERS_WITH_HEAD_NORMS = 64

Check = Callable[[Any, str], None]


@dataclass(frozen=True)
class GGUFRules:
    """What llama.cpp can hold of a family.

    Args:
        uniform (`str`): llama.cpp's architecture for layers of equal size.
        per_layer (`str`, *optional*): its architecture for layers of different sizes; `None` where there is none.
        all_heads (`bool`): llama.cpp takes the heads together to be as wide as the hidden size, so that the model must
            have all its heads.
        output_biases (`bool`): whether the projections that write to the residual stream can have biases.
        requires (`dict[str, Any]`): values of the config that llama.cpp's code takes for granted, by their keys.
        slides (`bool`): whether llama.cpp computes sliding windows.
        activations (`tuple[str, ...]`): activations of the MLP that llama.cpp computes.
        ropes (`tuple[str, ...]`): types of rotary embeddings that it computes; none where the family has none.
        checks (`tuple[Callable, ...]`): functions of the config and of `uniform` that raise `ValueError` where
            llama.cpp would compute something else.
    """

    uniform: str
    per_layer: str | None = None
    all_heads: bool = False
    output_biases: bool = False
    requires: Mapping[str, Any] = field(default_factory=dict)
    slides: bool = False
    activations: tuple[str, ...] = ("silu", "swish")
    ropes: tuple[str, ...] = ("default", "linear")
    checks: tuple[Check, ...] = ()

    def check(self, config: Any) -> None:
        """Raise `ValueError` where llama.cpp would compute something else than a model does, whatever its sizes.

        Args:
            config (`PreTrainedConfig`): the stock config of the model.
        """
        kind = rope_type(config)
        if kind is not None and kind not in self.ropes:
            raise ValueError(
                f"Rotary embeddings of type {kind!r} cannot be exported for {config.model_type}; those of type "
                f"{', '.join(self.ropes)} can be."
            )
        named = (getattr(config, key) for key in ACTIVATIONS if getattr(config, key, None) is not None)
        activation = next(named, None)
        if activation is not None and activation not in self.activations:
            raise ValueError(
                f"The MLPs of this model have the activation {activation!r}, and llama.cpp's {self.uniform} computes "
                f"{self.activations[0]!r}. Only a stock checkpoint holds it (--format stock)."
            )
        for key, value in self.requires.items():
            if getattr(config, key) != value:
                raise ValueError(
                    f"llama.cpp's {self.uniform} computes with {key}={value}, and this model has "
                    f"{key}={getattr(config, key)}. Only a stock checkpoint holds it (--format stock)."
                )
        if self.all_heads and (heads := config.num_attention_heads) * head_dim_of(config) != config.hidden_size:
            raise ValueError(
                f"llama.cpp's {self.uniform} divides the hidden size {config.hidden_size} by the number of heads "
                f"{heads}, and the heads of this model have {head_dim_of(config)} features. Only a stock checkpoint "
                f"holds it (--format stock)."
            )
        for check in self.checks:
            check(config, self.uniform)


def gguf_rules(config: Any) -> GGUFRules:
    """Return what llama.cpp can hold of the family of a stock config.

    Raises:
        ValueError: where there is no export for the family; the message has the reason.
    """
    rules = RULES.get(config.model_type)
    if rules is None:
        raise ValueError(
            f"There is no GGUF export for {config.model_type}; there is one for {', '.join(RULES)}. "
            f"{REASONS.get(config.model_type, '')}".rstrip()
        )
    return rules


def head_dim_of(config: Any) -> int:
    """Return the number of features of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_type(config: Any) -> str | None:
    """Return the type of the rotary embeddings, in the layers that attend to everything where these have their own."""
    return rope_of(config).get("rope_type", "default") if hasattr(config, "rope_parameters") else None


def rope_of(config: Any, layer_type: str = "full_attention") -> dict[str, Any]:
    """Return the parameters of the rotary embeddings of a type of layers."""
    return config.rope_parameters.get(layer_type, config.rope_parameters)


def no_soft_caps(config: Any, name: str) -> None:
    """Check that the model has no bounds of attention scores and logits, which llama.cpp would not apply."""
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, key) is not None:
            raise ValueError(f"{key} is {getattr(config, key)}, and llama.cpp's {name} computes without it.")


def head_norms_of_command_r(config: Any, name: str) -> None:
    """Check that llama.cpp expects norms of queries and keys where the model has them, which it tells by the number
    of layers."""
    if config.use_qk_norm != (config.num_hidden_layers >= LAYERS_WITH_HEAD_NORMS):
        raise ValueError(
            f"llama.cpp's {name} has norms of queries and keys in models of at least {LAYERS_WITH_HEAD_NORMS} "
            f"layers alone, and this model has {config.num_hidden_layers} layers and use_qk_norm="
            f"{config.use_qk_norm}. Only a stock checkpoint holds it (--format stock)."
        )


def layers_without_rope(config: Any, name: str) -> None:
    """Check that the layers without rotary embeddings are those of which llama.cpp takes it."""
    for number, has_rope in enumerate(config.no_rope_layers):
        if bool(has_rope) != ((number + 1) % PERIOD_WITHOUT_ROPE != 0):
            raise ValueError(
                f"llama.cpp's {name} has no rotary embeddings in every {PERIOD_WITHOUT_ROPE}th layer, and "
                f"layer {number} of this model differs. Prune heads or channels, or whole groups of "
                f"{PERIOD_WITHOUT_ROPE} layers. Only a stock checkpoint holds it as it is (--format stock)."
            )


def norms_of_olmoe(config: Any, name: str) -> None:
    """Check that the norms of queries and keys are equally wide, as llama.cpp takes them to be."""
    if config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(
            f"llama.cpp's {name} has norms of all query heads and of as many key heads, and this model has "
            f"{config.num_attention_heads} query heads and {config.num_key_value_heads} key heads. Only a stock "
            f"checkpoint holds it (--format stock)."
        )


LLAMA = GGUFRules("llama", "deci", output_biases=True, ropes=("default", "linear", "llama3"))
GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
# llama.cpp approximates GELU with tanh for every model.
GELU = ("gelu", *GELU_TANH)

# By the `model_type` of the stock config.
RULES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral": LLAMA,
    "qwen2": GGUFRules("qwen2", all_heads=True),
    "qwen3": GGUFRules("qwen3"),
    "gemma2": GGUFRules("gemma2", slides=True, activations=GELU_TANH),
    "gemma3_text": GGUFRules("gemma3", slides=True, activations=GELU_TANH, checks=(no_soft_caps,)),
    "phi3": GGUFRules("phi3", all_heads=True, ropes=("default", "linear", "longrope")),
    "olmo2": GGUFRules("olmo2", all_heads=True),
    "granite": GGUFRules("granite", output_biases=True),
    "starcoder2": GGUFRules(
        "starcoder2", all_heads=True, output_biases=True, requires={"use_bias": True}, activations=GELU_TANH
    ),
    "gpt_neox": GGUFRules(
        "gptneox", all_heads=True, output_biases=True, requires={"attention_bias": True}, activations=GELU
    ),
    "bloom": GGUFRules("bloom", all_heads=True, output_biases=True, activations=(), ropes=()),
    "gemma": GGUFRules("gemma", activations=GELU),
    "arcee": GGUFRules("arcee", activations=("relu2",)),
    "cohere": GGUFRules("command-r", all_heads=True, checks=(head_norms_of_command_r,)),
    "cohere2": GGUFRules("cohere2", all_heads=True, slides=True),
    "smollm3": GGUFRules("smollm3", checks=(layers_without_rope,)),
    "exaone4": GGUFRules(
        "exaone4", all_heads=True, ropes=("default", "linear", "llama3"), requires={"sliding_window": None}
    ),
    "olmo": GGUFRules("olmo", all_heads=True),
    "olmo3": GGUFRules("olmo2", all_heads=True, slides=True),
    "glm": GGUFRules("chatglm", all_heads=True),
    "glm4": GGUFRules("glm4"),
    "seed_oss": GGUFRules("seed_oss"),
    "ernie4_5": GGUFRules("ernie4_5"),
    "hunyuan_v1_dense": GGUFRules("hunyuan-dense"),
    "gpt2": GGUFRules("gpt2", all_heads=True, output_biases=True, activations=GELU_TANH, ropes=()),
    "falcon": GGUFRules(
        "falcon",
        all_heads=True,
        requires={"alibi": False, "parallel_attn": True, "bias": False},
        activations=GELU,
    ),
    "nemotron": GGUFRules("nemotron", all_heads=True, output_biases=True, activations=("relu2",)),
    "stablelm": GGUFRules("stablelm", all_heads=True),
    # llama.cpp divides the weights of the experts of a token by their sum, or takes them as they are.
    "mixtral": GGUFRules("llama"),
    "qwen3_moe": GGUFRules("qwen3moe", requires={"norm_topk_prob": True}),
    "qwen2_moe": GGUFRules("qwen2moe", all_heads=True, requires={"norm_topk_prob": False}),
    "olmoe": GGUFRules(
        "olmoe", all_heads=True, requires={"norm_topk_prob": False, "clip_qkv": None}, checks=(norms_of_olmoe,)
    ),
    "granitemoe": GGUFRules("granitemoe"),
    "gpt_oss": GGUFRules("gpt-oss", output_biases=True, slides=True, ropes=("default", "linear", "yarn")),
    "phi": GGUFRules("phi2", all_heads=True, output_biases=True, requires={"qk_layernorm": False}, activations=GELU),
}

_NO_CODE = "llama.cpp has no code for this family."
_PARTS = "llama.cpp reads the language model and the vision model from two files, which the export does not write."

_MIXTURES = ("deepseek_v3", "glm4_moe", "phimoe")

# Why there is no export of other families, as sentences.
REASONS = {
    **dict.fromkeys(_MIXTURES, "The export does not write the routers of this family."),
    **dict.fromkeys(("codegen", "gptj", "helium", "opt"), _NO_CODE),
    **dict.fromkeys(("gemma3", "llava", "qwen2_5_vl", "qwen3_vl"), _PARTS),
    "apertus": "The export does not write the parameters of its activation (xIELU).",
    "ministral3": "The export does not write its rotary embeddings (YaRN) and its scaling of queries by position.",
}
