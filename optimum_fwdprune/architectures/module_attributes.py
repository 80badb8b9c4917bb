"""Sizes of an attention, and the attributes in which the modules of a decoder layer keep theirs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class HeadSizes:
    """Sizes of an attention.

    Args:
        hidden (`int`): size of the residual stream.
        heads (`int`): query heads.
        kv_heads (`int`): key/value heads.
        head_dim (`int`): features of a head.
        heads_key (`str`): config key of the number of query heads.
        kv_heads_key (`str`, *optional*): config key of the number of KV heads; `None` where it has none.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    heads_key: str
    kv_heads_key: str | None

    @classmethod
    def of(cls, attention: Any, config: Any) -> HeadSizes:
        """Read off the sizes of an `attention` module and of the `config` of its model."""
        heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
        head_dim = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
        return cls(
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=kv_heads or heads,
            head_dim=head_dim or config.hidden_size // heads,
            heads_key=config.attribute_map.get("num_attention_heads", "num_attention_heads"),
            kv_heads_key=config.attribute_map.get("num_key_value_heads", "num_key_value_heads") if kv_heads else None,
        )

    @property
    def query_features(self) -> int:
        """Features of all query heads."""
        return self.heads * self.head_dim

    @property
    def key_features(self) -> int:
        """Features of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim

    def expression_of(self, attribute: str, value: int) -> str | None:
        """Return what an attribute of the attention is as an expression of a layer's `config`, or `None` where it does
        not follow the number of heads."""
        heads, kv_heads = f"config.{self.heads_key}", f"config.{self.kv_heads_key or self.heads_key}"
        if re.search("groups|n_rep|repeat", attribute):
            return f"{heads} // {kv_heads}" if self.kv_heads_key and value == self.heads // self.kv_heads else None
        own, features = (kv_heads, self.key_features) if re.search("kv|key_value", attribute) else (heads, 0)
        if "head" in attribute:
            return own if value == (self.kv_heads if features else self.heads) else None
        return f"{own} * config.head_dim" if value == (features or self.query_features) else None


def head_dim_attribute(module: nn.Module, sizes: HeadSizes) -> str:
    """Return the attribute of an attention with the number of features of a head.

    Raises:
        ValueError: where it has none.
    """
    names = [name for name, value in vars(module).items() if type(value) is int and value == sizes.head_dim]
    named = [name for name in names if re.search("head_?(dim|size)|(dim|size|channels)_?(per_)?(head|kv)|kv_", name)]
    if not named:
        raise ValueError(
            f"A {type(module).__name__} has no attribute with the number of features of a head, {sizes.head_dim}, "
            f"which a layout names as head_dim."
        )
    return min(named, key=lambda name: name != "head_dim")


def size_attributes(module: nn.Module, name: str, expression_of: Callable[[str, int], str | None]) -> dict[str, str]:
    """Return the attributes of a module that follow its sizes, by their names inside the decoder layer, each with an
    expression of the layer's `config`.

    Args:
        module (`Module`): an attention or an MLP.
        name (`str`): its name inside the decoder layer; empty where it is the layer itself.
        expression_of (`Callable[[str, int], str | None]`): from the name and value of an attribute to its expression.
    """
    code = _methods(type(module))
    attributes = {}
    for attribute, value in vars(module).items():
        expression = expression_of(attribute, value) if type(value) is int and attribute[0] != "_" else None
        # What only the constructor reads has done its work. Functions outside the class read heads and groups.
        if expression and (re.search("head|group", attribute) or code is None or f"self.{attribute}" in code):
            attributes[attribute] = expression
    prefix = f"{name}." if name else ""
    return {f"{prefix}{attribute}": expression for attribute, expression in attributes.items()}


def reads_config(module: nn.Module, keys: Iterable[str]) -> bool:
    """Whether the methods of a module's class read one of `keys` from its config when it runs."""
    code = _methods(type(module)) or ""
    return any(f"self.config.{key}" in code for key in keys)


def _methods(module_class: type) -> str | None:
    """Return the source of a class without its constructor; `None` where it cannot be read."""
    try:
        code = inspect.getsource(module_class)
    except (OSError, TypeError):
        return None
    return re.sub(r"    def __init__\(.*?(?=\n    def |\n    @|\Z)", "", code, flags=re.DOTALL)
