"""First-order Taylor expansion by back-propagation (LLM-Pruner, arXiv 2305.11627)."""

from __future__ import annotations

from dataclasses import dataclass

from ...request.config import PruningConfig, register_method
from ...request.fields import option
from ...request.registry import register_preset
from ..choices import Salience
from .scoring import ScoringInputs


@dataclass
class TaylorConfig(PruningConfig):
    """The first-order change of the loss, by back-propagation: |Σ W · ∂L/∂W| or Σ |W · ∂L/∂W|.

    The sum is over all weights that a unit owns. The gradients of these weights are held in memory. The preset
    `"llm-pruner-paper"` has the published settings.
    """

    method: str = "taylor"
    salience: str = option(
        Salience.VECTOR,
        "Whether the absolute value of W · ∂L/∂W is taken after summing over the unit (vector) or element by element "
        "(element).",
        Salience,
    )


def score(inputs: ScoringInputs) -> dict:
    from ..gradients.backprop import weight_gradients

    config = inputs.config
    owned = [(site, coupling, parameter) for site in inputs.sites for coupling, parameter in site.owned_parameters()]
    parameters = [parameter for _, _, parameter in owned]
    gradients = weight_gradients(inputs.model, parameters, inputs.calibration, config.batch_size)
    scores: dict = {}
    for (site, coupling, parameter), gradient in zip(owned, gradients):
        salience = gradient.mul_(parameter.detach())
        salience = salience.abs_() if config.salience == Salience.ELEMENT else salience
        scores[site.key] = scores.get(site.key, 0) + site.sum_owned(coupling, parameter, salience)
    return {key: value.abs() for key, value in scores.items()}


register_method(
    TaylorConfig,
    score,
    calibrated=True,
    differentiates=lambda _config: True,
    windows=lambda config: 3 * config.n_samples,
)
register_preset(
    "llm-pruner-paper",
    "LLM-Pruner as published for LLaMA-7B: element-wise Taylor scores; the first four and last two layers are not "
    "pruned.",
    method="taylor",
    salience="element",
    kinds=["attention", "mlp"],
    scope="layer",
    budget="separate",
    attention_unit="kv_group",
    skip_layers=[0, 1, 2, 3, -2, -1],
    reconstruction="none",
    n_samples=10,
    seq_len=128,
)
