"""MINI-LLM: Feature Map Sensitivity with gradients from forward passes (arXiv 2407.11681)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...request.config import PruningConfig, register_method
from ...request.fields import option
from ...request.registry import register_preset
from ..choices import Aggregation, Gradient, NoiseDistribution, Perturbed
from .scoring import ScoringInputs, UnitScores


@dataclass
class MiniLlmConfig(PruningConfig):
    """Weight times gradient times activation, with a gradient from forward passes: Σ |W · ∂L/∂W| · ‖X‖₂.

    `gradient` replaces the estimate by exact back-propagation, or by one of two controls that do not use the loss.
    """

    method: str = "mini_llm"
    gradient: str = option(
        Gradient.ZEROTH_ORDER,
        "How ∂L/∂W is computed: estimated by forward passes (zeroth_order), by back-propagation (exact), or replaced "
        "by a control (ones, random).",
        Gradient,
    )
    perturb: str = option(
        Perturbed.WEIGHTS,
        "What is perturbed: every weight, as published (weights), or the gate of every unit, which are thousands of "
        "times fewer numbers (units).",
        Perturbed,
    )
    draws: int = option(64, "Number of perturbations; each takes two forward passes over windows_per_draw windows.")
    epsilon: float | None = option(None, "Step size of a perturbation. Default: 1e-3, and 1e-2 for models in 16 bit.")
    noise: str = option(NoiseDistribution.RADEMACHER, "Distribution of the perturbations.", NoiseDistribution)
    windows_per_draw: int | None = option(
        None, "Calibration windows per draw. Default: 4 for perturb=weights, 1 for perturb=units."
    )
    stop_after: int | None = option(
        None,
        "Stop once the kept units are the same as this many draws before. Every check generates all noise so far "
        "again. Default: never.",
    )
    aggregation: str = option(Aggregation.SUM, "How the sensitivities of a unit's weights are combined.", Aggregation)

    def __post_init__(self):
        super().__post_init__()
        for name in ("draws", "windows_per_draw", "stop_after"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        if self.epsilon is not None and not 0 < self.epsilon <= 1:
            raise ValueError(f"epsilon must be in (0, 1]; got {self.epsilon}. 1e-3 suits most models.")


# Number of groups of draws that the jackknife leaves out in turn; as many copies of a linear are in memory.
GROUPS: dict[str, int] = {Perturbed.WEIGHTS: 8, Perturbed.UNITS: 32}
# By bytes per weight. On SmolLM2-135M in bfloat16, rounding exceeds the slope with a step of 1e-3.
EPSILON = {2: 1e-2, 4: 1e-3, 8: 1e-3}
WINDOWS_PER_DRAW: dict[str, int] = {Perturbed.WEIGHTS: 4, Perturbed.UNITS: 1}


def score(inputs: ScoringInputs) -> UnitScores:
    from ..gradients.perturbation import Noise
    from ..gradients.sensitivity import UnitSensitivity, WeightSensitivity

    config = inputs.config
    noise = Noise(config.seed, config.noise)
    sensitivity = (
        UnitSensitivity(inputs.sites, inputs.statistics, noise)
        if config.perturb == Perturbed.UNITS
        else WeightSensitivity(inputs.sites, inputs.statistics, noise, config.aggregation)
    )
    if config.gradient == Gradient.ZEROTH_ORDER:
        return _estimate(inputs, sensitivity)
    scores = sensitivity.of(_known_gradient(inputs, sensitivity.perturbation))
    return UnitScores({key: estimates[0] for key, estimates in scores.items()})


def _estimate(inputs: ScoringInputs, sensitivity) -> UnitScores:
    from ..gradients.sensitivity import estimated, jackknife
    from ..gradients.zeroth_order import Sampling, Stopping, draw_slopes

    config = inputs.config
    previously_kept = None

    def is_settled(draws) -> bool:
        nonlocal previously_kept
        scores = sensitivity.of(estimated(sensitivity.perturbation, draws, groups=1))
        kept = inputs.keep({key: estimates[0] for key, estimates in scores.items()})
        settled = kept == previously_kept
        previously_kept = kept
        return settled

    sampling = Sampling(
        draws=config.draws,
        epsilon=config.epsilon or EPSILON[inputs.model.dtype.itemsize],
        windows_per_draw=config.windows_per_draw or WINDOWS_PER_DRAW[config.perturb],
        batch_size=config.batch_size,
    )
    stopping = Stopping(is_settled, config.stop_after) if config.stop_after else None
    draws = draw_slopes(inputs.model, sensitivity.perturbation, inputs.calibration, sampling, stopping, inputs.resume)
    scores = sensitivity.of(estimated(sensitivity.perturbation, draws, GROUPS[config.perturb]))
    return UnitScores(
        {key: estimates[0] for key, estimates in scores.items()},
        {key: jackknife(estimates) for key, estimates in scores.items()},
        {
            "draws": len(draws.indices),
            "rejected_draws": draws.rejected,
            "epsilon": draws.epsilon,
            "mean_loss": float(draws.losses.mean()),
            "slope_size": float(draws.slopes.square().mean().sqrt()),
            "rounding_floor": draws.rounding_floor,
            "stopped_early": draws.converged,
        },
    )


def _known_gradient(inputs: ScoringInputs, perturbation) -> Callable:
    """Return the exact gradient, or a control, in the form that sensitivities need."""
    import torch

    from ..gradients.backprop import unit_gradients, weight_gradients
    from ..gradients.perturbation import Noise

    config = inputs.config
    if config.gradient == Gradient.ONES:
        return lambda index: [
            torch.ones(perturbation.shapes[index], dtype=torch.float32, device=perturbation.device(index))
        ]
    if config.gradient == Gradient.RANDOM:
        noise = Noise(config.seed, NoiseDistribution.GAUSSIAN)
        shapes, device = perturbation.shapes, perturbation.device
        return lambda index: [noise.tensor(shapes[index], 0, index, torch.float32, device(index))]
    if config.perturb == Perturbed.UNITS:
        gates = unit_gradients(inputs.model, inputs.sites, inputs.calibration, config.batch_size)
        vector = torch.cat([gates[site.key].cpu() for site in inputs.sites])
        return lambda index: [vector]
    parameters = [parameter for site in inputs.sites for _, parameter in site.owned_weights()]
    gradients = weight_gradients(inputs.model, parameters, inputs.calibration, config.batch_size)
    return lambda index: [gradients[index]]


def _is_additive(config) -> bool:
    return config.perturb == Perturbed.UNITS or config.aggregation == Aggregation.SUM


def _differentiates(config) -> bool:
    return config.gradient == Gradient.EXACT


def _windows(config) -> float:
    if config.gradient == Gradient.ZEROTH_ORDER:
        return 2 * config.draws * (config.windows_per_draw or WINDOWS_PER_DRAW[config.perturb])
    return 3 * config.n_samples if config.gradient == Gradient.EXACT else 0


register_method(
    MiniLlmConfig,
    score,
    statistics=("moments", "source_norms"),
    additive=_is_additive,
    differentiates=_differentiates,
    windows=_windows,
)
register_preset(
    "mini-llm-paper",
    "MINI-LLM as published: Gaussian perturbations of every weight, heads and channels, without reconstruction.",
    method="mini_llm",
    gradient="zeroth_order",
    perturb="weights",
    noise="gaussian",
    aggregation="sum",
    kinds=["attention", "mlp"],
    scope="layer",
    budget="separate",
    attention_unit="kv_group",
    skip_layers=[],
    reconstruction="none",
)
