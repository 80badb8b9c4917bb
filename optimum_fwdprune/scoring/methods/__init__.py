"""The criteria, one file each. Importing this package registers all of them."""

from ...request.config import PruningConfig, register_method
from ...request.registry import (
    get_method,
    get_preset,
    register_preset,
    registered_methods,
    registered_presets,
)
from . import presets  # noqa: F401  each registers itself
from .block_influence import BlockInfluenceConfig
from .expert_frequency import ExpertFrequencyConfig
from .flap import FlapConfig
from .magnitude import MagnitudeConfig
from .mini_llm import MiniLlmConfig
from .policy_gradient import PolicyGradientConfig
from .random import RandomConfig
from .reap import ReapConfig
from .removal_loss import RemovalLossConfig
from .scoring import ScoringInputs, UnitScores
from .taylor import TaylorConfig
from .wanda_sp import WandaSpConfig


__all__ = [
    "BlockInfluenceConfig",
    "ExpertFrequencyConfig",
    "FlapConfig",
    "MagnitudeConfig",
    "MiniLlmConfig",
    "PolicyGradientConfig",
    "PruningConfig",
    "RandomConfig",
    "ReapConfig",
    "RemovalLossConfig",
    "ScoringInputs",
    "TaylorConfig",
    "UnitScores",
    "WandaSpConfig",
    "get_method",
    "get_preset",
    "register_method",
    "register_preset",
    "registered_methods",
    "registered_presets",
]
