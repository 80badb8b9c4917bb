"""Model families: the registry, and the sites of a loaded model."""

from ..models.layout import AttentionLayout, DecoderLayout, MLPLayout
from .coupling import Coupling, Segment
from .depth import layers_left
from .registry import (
    Architecture,
    find_sites,
    get_architecture,
    is_pruned,
    is_supported,
    register_architecture,
    registered_architectures,
    supported_architectures,
)
from .site import (
    Site,
    SiteKey,
    keyed_by_site,
)
from .sites import head_counts
from .transposed import as_linear, as_stored, stored_axis


__all__ = [
    "Architecture",
    "AttentionLayout",
    "Coupling",
    "DecoderLayout",
    "MLPLayout",
    "Segment",
    "Site",
    "SiteKey",
    "as_linear",
    "as_stored",
    "find_sites",
    "get_architecture",
    "head_counts",
    "is_pruned",
    "is_supported",
    "keyed_by_site",
    "layers_left",
    "register_architecture",
    "registered_architectures",
    "stored_axis",
    "supported_architectures",
]
