"""Model families: where each keeps its units, and nothing about how units are chosen."""

from . import bloom, llama, mistral, opt, qwen2, qwen3  # noqa: F401  each registers itself
from .layout import AttentionLayout, MLPLayout
from .registry import (
    Architecture,
    find_sites,
    get_architecture,
    is_pruned,
    register_architecture,
    registered_architectures,
    supported_architectures,
)
from .site import (
    ATTENTION,
    ATTENTION_UNITS,
    KINDS,
    KV_GROUP,
    MLP,
    QUERY_HEAD,
    Coupling,
    Segment,
    Site,
    SiteKey,
    keyed_by_site,
)


__all__ = [
    "ATTENTION",
    "ATTENTION_UNITS",
    "KINDS",
    "KV_GROUP",
    "MLP",
    "QUERY_HEAD",
    "Architecture",
    "AttentionLayout",
    "Coupling",
    "MLPLayout",
    "Segment",
    "Site",
    "SiteKey",
    "find_sites",
    "get_architecture",
    "is_pruned",
    "keyed_by_site",
    "register_architecture",
    "registered_architectures",
    "supported_architectures",
]
