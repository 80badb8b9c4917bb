"""Settling requests for one model: budgets in every unit, checks of the model, and the forecast of the result."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..allocation.budgets import Budget, OutOfReach, removal_budget
from ..allocation.fitting import check_without_layers
from ..allocation.plan import PruningPlan
from ..architectures import SiteKey
from ..forward.memory import Memory
from ..loading.subject import Sizes, Subject
from ..reconstruction.bias import added_parameters, kinds_gaining_bias
from ..request.config import PruningConfig
from ..request.speed import shares_of_phases
from ..runs.progress import announce
from .forecast import Forecast, forecast, forecast_of_plan, warn_of_rounding
from .gguf_layout import check_gguf_request, costs_of_gguf, with_gguf_layout
from .latency import LatencyTable, at_measured_widths, speed_budget
from .parallel import check_tensor_parallel
from .serving import Serving
from .settling import kept_by_equal_scores, settle, settled_request
from .stock_layout import STOCK, check_stock_request
from .timing import load_or_measure


class Settler:
    """Settles requests for a model.

    Args:
        subject (`Subject`): the dense model with all its sites.
        latencies (`LatencyTable`, *optional*): latencies of the model, if they were measured before.

    Attributes:
        latencies (`LatencyTable`, *optional*): latencies, which are measured for the first request that needs them.
    """

    def __init__(self, subject: Subject, latencies: LatencyTable | None):
        self._subject = subject
        # Surgery consumes the dense model.
        self._sizes = Sizes.of(subject.model, subject.sites)
        self.latencies = latencies
        self._memories: dict[Any, Memory] = {}
        self._warned_of_context = False

    def check(self, config: PruningConfig) -> None:
        """Raise an error where the constraints of a request do not allow its budget, or where only whole layers that
        the request does not name could meet it; nothing is logged."""
        config = with_gguf_layout(self._subject, config)
        settled, _, _ = settled_request(self._subject.sites, config, self._budget_of, self._check_allowed)
        if settled.depth_kind != config.depth_kind:
            raise OutOfReach(
                f"{config.resolved_kinds} cannot meet the budget alone, and all models need the same scores. Set "
                f"kinds={settled.resolved_kinds} for all of them, or choose a smaller budget."
            )

    def settled(self, config: PruningConfig, may_remove_layers: bool = True) -> tuple[PruningConfig, Budget]:
        """Return the settled request and its budget; nothing is logged. The arguments are those of [`announced`]."""
        config = with_gguf_layout(self._subject, config)
        settled, budget, _ = settled_request(
            self._subject.sites, config, self._budget_of, self._check_allowed, may_remove_layers
        )
        return settled, budget

    def announced(self, config: PruningConfig, may_remove_layers: bool = True) -> tuple[PruningConfig, Budget]:
        """Return the settled request and its budget, and log a forecast of the result.

        Args:
            config (`PruningConfig`): the request.
            may_remove_layers (`bool`, defaults to `True`): whether layers can be scored where the request does not
                name them.
        """
        config, budget, outcome, notes = self.foreseen(config, may_remove_layers)
        for text in (str(outcome), *notes):
            announce(text)
        return config, budget

    def foreseen(
        self, config: PruningConfig, may_remove_layers: bool = True
    ) -> tuple[PruningConfig, Budget, Forecast, list[str]]:
        """Return the settled request, its budget, a forecast of the result, and what `for_gguf` requires; log warnings
        of what is not as requested. The arguments are those of [`announced`]."""
        sites, dense, asked = self._subject.sites, self._sizes, config
        config = with_gguf_layout(self._subject, config)
        config, budget = settle(sites, config, self._budget_of, self._check_allowed, may_remove_layers)
        outcome = forecast(sites, config, budget, dense.parameters, dense.bytes, self._added(config))
        notes = [] if config.for_gguf is None else self._costs_of_gguf(asked, config, budget)
        if config.rounds == 1:
            warn_of_rounding(sites, config, budget, outcome)
        return config, budget, outcome, notes

    def foreseen_of_plan(self, plan: PruningPlan, config: PruningConfig) -> Forecast:
        """Return a forecast of the replay of a plan with the reconstruction of a request."""
        sites, dense = self._subject.sites, self._sizes
        gaining = kinds_gaining_bias(sites, plan.kept, config.reconstruction)
        added = added_parameters((site for site in sites if site.kind in gaining), config.reconstruction)
        return forecast_of_plan(sites, plan, dense.parameters, dense.bytes, added)

    def _costs_of_gguf(self, asked: PruningConfig, config: PruningConfig, budget: Budget) -> list[str]:
        """Return what `for_gguf` requires, and how far it moves the share that is removed.

        Args:
            asked (`PruningConfig`): the request before it was settled.
            config (`PruningConfig`): the settled request.
            budget (`Budget`): its budget.
        """
        kept = kept_by_equal_scores(self._subject.sites, config, budget)
        before: Mapping[SiteKey, list[int]] | None = None
        if asked.target_speedup is None:
            # Other widths would have to be timed.
            with suppress(ValueError):
                before = kept_by_equal_scores(self._subject.sites, *self.settled(replace(asked, for_gguf=None)))
        return list(costs_of_gguf(self._subject, config, kept, before))

    def _budget_of(self, config: PruningConfig) -> tuple[PruningConfig, Budget]:
        """Return a request with its constraints adapted, and its budget."""
        sites, dense = self._subject.sites, self._sizes
        if config.target_memory is not None:
            serving = Serving(self._subject, config, self._memories)
            budget = serving.budget()
            if not self._warned_of_context:
                serving.warn_of_context()
                self._warned_of_context = True
            return config, budget
        if config.target_speedup is None:
            return config, removal_budget(config, sites, dense.parameters, dense.file_bytes, self._added(config))
        self.latencies = load_or_measure(self._subject, config, self.latencies)
        latencies = self.latencies.combined(shares_of_phases(config.speed_of))
        return at_measured_widths(sites, config), speed_budget(latencies, config.target_speedup)

    def _added(self, config: PruningConfig) -> int:
        """Return the number of parameters that the reconstruction of a request adds."""
        pruned = (site for site in self._subject.sites if site.kind in config.width_kinds)
        return added_parameters(pruned, config.reconstruction)

    def _check_allowed(self, config: PruningConfig) -> None:
        """Raise `ValueError` where the model does not allow a request."""
        check_tensor_parallel(self._subject, config)
        check_gguf_request(self._subject, config)
        if config.layout == STOCK:
            check_stock_request(self._subject, config)
        if config.depth_kind is not None:
            # The check is the same for all layers.
            check_without_layers(self._subject.model, range(len(self._subject.layers) - 1))
