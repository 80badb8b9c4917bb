"""Criteria, one file each. Importing this package registers them all."""

from ..configuration import PruningConfig, get_method, register_method, registered_methods
from .flap import FlapConfig
from .magnitude import MagnitudeConfig
from .random import RandomConfig
from .scoring import ScoringInputs
from .wanda_sp import WandaSpConfig


__all__ = [
    "FlapConfig",
    "MagnitudeConfig",
    "PruningConfig",
    "RandomConfig",
    "ScoringInputs",
    "WandaSpConfig",
    "get_method",
    "register_method",
    "registered_methods",
]
