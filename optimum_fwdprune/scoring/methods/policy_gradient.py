"""Policy-gradient pruning: keep probabilities learned by forward passes (arXiv 2406.10576)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ...request.budget_options import DEFAULT_DEPTH_METHOD, DEFAULT_METHOD
from ...request.choices import WIDTH_KINDS, BudgetSharing, Scope
from ...request.config import PruningConfig, register_method
from ...request.fields import option
from ...request.registry import get_method, register_preset, registered_methods
from ..choices import Estimator, Initialization, Parametrization
from .scoring import DEPTH_KINDS, ScoringInputs, UnitScores


# There are thousands of times as many units as sites to learn from the same losses; larger steps are too noisy.
LEARNING_RATES: dict[str, float] = {Parametrization.RATIO: 0.05, Parametrization.UNIT: 0.02}


@dataclass
class PolicyGradientConfig(PruningConfig):
    """Keep probabilities of units, learned from the losses of random masks, without back-propagation.

    With `parametrization="unit"`, as in the paper, the score of a unit is its learned keep probability. `"ratio"`
    learns a keep ratio per site, whose units are ranked by the metric. These are fewer numbers and take fewer steps.
    The score of a unit is then the difference between its site's ratio and its rank.

    `scope` and `budget` determine between which units probability may move. The paper uses `scope="global",
    budget="separate"`: one budget for all heads and one for all channels. `budget="joint"` weighs units by their
    parameters.
    """

    method: str = "policy_gradient"
    scope: str | None = option(
        None,
        "Whether every layer loses the same share (layer), or layers compete for one budget (global). Default: "
        "global, and layer where layout is stock.",
        (Scope.LAYER, Scope.GLOBAL),
    )
    parametrization: str = option(
        Parametrization.RATIO,
        "What is learned: a keep ratio per site, whose units the metric ranks (ratio), or a keep probability per unit "
        "(unit).",
        Parametrization,
    )
    ratio_spread: float = option(0.1, "Standard deviation of the ratios that are drawn with parametrization=ratio.")
    steps: int = option(
        300, "Updates of the probabilities; each takes masks_per_step forward passes over windows_per_step windows."
    )
    learning_rate: float | None = option(
        None, "Learning rate of SGD, which falls to 0 along a cosine. Default: 0.05 for ratios, 0.02 for units."
    )
    estimator: str = option(
        Estimator.LEAVE_ONE_OUT,
        "Baseline of a mask's loss: the losses of the other masks of the step, or the paper's moving average.",
        Estimator,
    )
    masks_per_step: int = option(4, "Masks per step, which are compared on the same windows.")
    antithetic: bool = option(False, "Draw masks in pairs with opposite deviations.")
    windows_per_step: int = option(2, "Calibration windows per step.")
    baseline_horizon: float = option(5.0, "Number of steps that the moving average covers.")
    initialization: str = option(
        Initialization.SIGMOID,
        "How the metric's scores become probabilities (sigmoid, min_max), or a start without scores (constant, "
        "random).",
        Initialization,
    )
    metric: str | None = option(
        None,
        "Method whose scores the probabilities start from. Default: wanda_sp, and block_influence for layers and "
        "sublayers.",
    )
    metric_samples: int | None = option(None, "Calibration windows for the metric. Default: all.")
    stop_when_flat: int | None = option(
        None,
        "Stop once the mean loss has not improved over three stretches of this many steps in a row. Default: never.",
    )

    def __post_init__(self):
        super().__post_init__()
        for name, least in (
            ("steps", 0),
            ("masks_per_step", 2),
            ("windows_per_step", 1),
            ("metric_samples", 1),
            ("stop_when_flat", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                reason = " A mask's baseline is the loss of another one." if name == "masks_per_step" else ""
                raise ValueError(f"{name} must be at least {least}; got {value}.{reason}")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive; got {self.learning_rate}.")
        if self.baseline_horizon < 1:
            raise ValueError(f"baseline_horizon must be at least 1 step; got {self.baseline_horizon}.")
        if self.ratio_spread <= 0:
            raise ValueError(f"ratio_spread must be positive; got {self.ratio_spread}.")
        if (
            self.parametrization == Parametrization.RATIO
            and self.resolved_scope == Scope.LAYER
            and not self._kinds_trade
        ):
            reason, way_out = "scope='layer'", "use scope='global' or budget='joint', or parametrization='unit'"
            if self.cuts_alike:
                reason, way_out = self.alike_by, f"use parametrization='unit', or leave out {self.alike_by}"
            raise ValueError(
                f"parametrization='ratio' moves ratios between sites, and {reason} with a budget for each kind leaves "
                f"every site on its own; {way_out}."
            )
        if self.antithetic and self.estimator == Estimator.MOVING_AVERAGE:
            raise ValueError(
                "antithetic masks cancel their partners' deviations, which the moving average does not allow for; use "
                "estimator='leave_one_out'."
            )
        if self.antithetic and (self.masks_per_step % 2 or self.masks_per_step < 4):
            raise ValueError(
                f"antithetic masks come in pairs, and a pair's baseline is another pair: masks_per_step must be 4, 6, "
                f"...; got {self.masks_per_step}."
            )
        metrics = _metrics(self)
        if self.resolved_metric not in metrics:
            raise ValueError(f"metric must be one of {', '.join(metrics)}; got {self.metric!r}.")

    @property
    def resolved_metric(self) -> str:
        """The method whose scores the probabilities start from."""
        return self.metric or (DEFAULT_METHOD if self.depth_kind is None else DEFAULT_DEPTH_METHOD)

    @property
    def _kinds_trade(self) -> bool:
        return self.budget == BudgetSharing.JOINT and not self.has_budget_per_kind and len(self.width_kinds) > 1

    @classmethod
    def paper(cls, **fields) -> PolicyGradientConfig:
        """Return the settings of the paper's released scripts, the preset `"policy-gradient-paper"`.

        2 masks per step on 8 x 128 tokens, moving-average baseline over 5 steps, learning rate 2e-3 (LLaMA-2-7B; 6e-3
        for LLaMA-3-8B), 15,000 steps over 120,000 sequences of C4, probabilities from Wanda-sp on 128 x 1024 tokens
        through a sigmoid, separate global budgets of KV groups and channels, no reconstruction, seed 42.
        """
        config = cls.from_preset("policy-gradient-paper", **fields)
        assert isinstance(config, cls)
        return config


def _metrics(config: PolicyGradientConfig) -> list[str]:
    """Return the methods that score all kinds of the request."""
    kinds = set(config.resolved_kinds) if config.depth_kind is None else {config.depth_kind}
    return [name for name in registered_methods() if name != config.method and kinds <= set(get_method(name).kinds)]


def score(inputs: ScoringInputs) -> UnitScores:
    import torch

    from ...allocation.constraints import prunable_sites
    from ...allocation.depth import open_units
    from ...loading.subject import Subject
    from ..learning.depth_policy import depth_policy
    from ..learning.mask_learning import (
        Progress,
        Schedule,
        history_by_site,
        learn_rates,
    )

    config = inputs.config
    if config.depth_kind is None:
        learned, units = prunable_sites(inputs.sites, config), []
    else:
        units = open_units(inputs.sites[:], config)
        learned = [site for unit in units for site in unit.sites]
    # Units that the request does not prune are kept.
    values = {site.key: torch.ones(site.num_units, dtype=torch.float32) for site in inputs.sites}
    if config.depth_kind is not None:
        values = {unit.key: torch.ones(1) for unit in inputs.depth_units}
    if not learned:
        return UnitScores(values)
    stage = inputs.resume.stage("policy_gradient", inputs.calibration)
    # The state is checked before anything is measured.
    interrupted = stage.load(Progress.of)
    metric = {key: scores.cpu() for key, scores in _metric_scores(inputs).items()}
    policy, rates = depth_policy(inputs, units, learned, metric) if units else _policy(inputs, learned, metric)
    state = interrupted or Progress(0, rates)
    own = {field.name for field in dataclasses.fields(config)}
    options: dict = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(Schedule) if field.name in own
    }
    options["prunable_parameters"] = sum(site.num_parameters for site in inputs.sites)
    parametrization = Parametrization.UNIT if units else config.parametrization
    options["learning_rate"] = config.learning_rate or LEARNING_RATES[parametrization]
    schedule = Schedule(**options)
    learn_rates(Subject(inputs.model, learned), inputs.calibration, policy, state, schedule, stage)
    sizes = [1] * len(units) or [site.num_units for site in learned]
    keys = [unit.key for unit in units] or [site.key for site in learned]
    values |= dict(zip(keys, policy.scores(state.rates).split(sizes)))
    details: dict = {"steps": state.step, "skipped_steps": state.skipped, "rejected_masks": state.rejected}
    if state.step:
        details["expected_loss"] = state.expected_loss
        details["entropy_bits"] = float(state.history["entropy"][-1])
    return UnitScores(values, details=details, history=history_by_site(state, learned))


def _metric_scores(inputs: ScoringInputs) -> dict:
    """Return the metric's scores, computed with its own config and statistics, from which the probabilities start."""
    from ...forward.gathering import gather_statistics
    from ...forward.statistics import PlacedStatistics
    from ...loading.subject import Subject

    method = get_method(inputs.config.resolved_metric)
    shared = {field.name for field in dataclasses.fields(PruningConfig)} - {"method"}
    config = method.config_class(**{name: getattr(inputs.config, name) for name in shared})
    tokens = inputs.calibration.part(slice(inputs.config.metric_samples))
    gathered: dict = {}
    if method.statistics:
        (gathered,) = gather_statistics(
            Subject(inputs.model, inputs.sites), [tokens], config.batch_size, method.statistics, inputs.resume
        )
    statistics = PlacedStatistics(inputs.sites, gathered)
    scored = method.score(dataclasses.replace(inputs, config=config, calibration=tokens, statistics=statistics))
    return dict(scored.values if isinstance(scored, UnitScores) else scored)


def _policy(inputs: ScoringInputs, sites: list, metric: dict) -> tuple:
    """Return the policy that masks are drawn from, and the initial keep rates."""
    from ...allocation.constraints import fewest_units
    from ..learning.policies import (
        RatioPolicy,
        Ratios,
        UnitPolicy,
        Variables,
        budgets_of,
        even_rates,
        initial_probabilities,
    )
    from ..learning.policy_gradient import FLOOR

    config = inputs.config
    kept = inputs.keep(metric)
    if config.parametrization == Parametrization.RATIO:
        variables = [Variables(site, 1, fewest_units(site, config) / site.num_units) for site in sites]
        budgets = budgets_of(variables, kept, config, exact=True)
        if all(len(budget.members) == 1 for budget in budgets):
            raise ValueError(
                "parametrization='ratio' moves ratios between sites, and every site has a budget of its own here; use "
                "budget='joint', prune more layers, or use parametrization='unit'."
            )

        def keep(scores):
            return inputs.keep(metric | scores)

        return RatioPolicy(Ratios(sites, metric, keep), budgets, config.ratio_spread), even_rates(budgets, len(sites))
    sizes = [site.num_units for site in sites]
    variables = [Variables(site, site.num_units, FLOOR) for site in sites]
    budgets = budgets_of(variables, kept, config, exact=False)
    rates = [float(part[0]) for part in even_rates(budgets, sum(sizes)).split(sizes)]
    scores = [metric[site.key] for site in sites]
    return UnitPolicy(sites, budgets), initial_probabilities(scores, rates, config.initialization, config.seed)


register_method(
    PolicyGradientConfig,
    score,
    calibrated=True,
    additive=False,
    learns_split=True,
    # Masks draw every expert by itself, and often fewer of a layer than a token uses.
    kinds=(*WIDTH_KINDS, *DEPTH_KINDS),
    windows=lambda config: config.steps * config.masks_per_step * config.windows_per_step,
)
register_preset(
    "policy-gradient-paper",
    "The settings of the policy-gradient paper's released scripts.",
    method="policy_gradient",
    parametrization="unit",
    steps=15_000,
    learning_rate=2e-3,
    estimator="moving_average",
    masks_per_step=2,
    windows_per_step=8,
    baseline_horizon=5.0,
    initialization="sigmoid",
    metric="wanda_sp",
    metric_samples=1024,
    scope="global",
    kinds=["attention", "mlp"],
    budget="separate",
    attention_unit="kv_group",
    reconstruction="none",
    calibration="c4",
    n_samples=120_000,
    seq_len=128,
    batch_size=16,
    seed=42,
)
