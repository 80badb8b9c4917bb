"""Running a few tokens through the masked dense model, whose logits the pruned model must reproduce."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..allocation.plan import PruningPlan
from ..architectures import SiteKey
from ..data.calibration import Calibration
from ..forward.gates import Projection, gated, replaced_projections
from ..forward.layerwise import LayerRunner
from ..loading.subject import Subject
from ..runs.shelves import Shelf
from .verification import probe_batch, rounded, share_of_scale


class Probe:
    """Tokens that pass through the dense model layer by layer, with the plan's gates and the new projections.

    They pass a second time with a rounding error in the embeddings, to measure the difference that rounding causes.

    Args:
        subject (`Subject`): the dense model, in eval mode, with all its sites; it is not changed.
        plan (`PruningPlan`): the units that the sites keep.
        calibration (`Calibration`, *optional*): text to take the tokens from.
        shelf (`Shelf`): storage for hidden states, and the progress of an interrupted run.

    Attributes:
        tokens (`Tensor[1 or 2, at most 32]`, int64): the tokens.
    """

    def __init__(self, subject: Subject, plan: PruningPlan, calibration: Calibration | None, shelf: Shelf):
        self._subject, self._plan, self._shelf = subject, plan, shelf
        self._runner = LayerRunner(subject.model)
        self.tokens = probe_batch(subject.model, calibration)
        (self._batch,) = self._runner.batches(Calibration(self.tokens), len(self.tokens))
        if shelf.settled == 0:
            embedded = self._runner.embed(self._batch)
            shelf["0.masked"], shelf["0.rounded"] = embedded, rounded(embedded)
            shelf.settle(0)

    @torch.no_grad()
    def pass_layer(self, number: int, projections: Mapping[SiteKey, Projection]) -> None:
        """Run the tokens through a layer, unless an interrupted run has done so.

        Args:
            number (`int`): the number of the layer.
            projections (mapping of site key to `Projection`): the new parameters of its sites.
        """
        if self._shelf.settled > number:
            return
        sites = [site for site in self._subject.sites if site.layer == number]
        masks = {site.key: site.unit_mask(self._plan.kept[site.key]) for site in sites}
        for name in ("masked", "rounded"):
            hidden = self._shelf.pop(f"{number}.{name}")
            with gated(sites, masks), replaced_projections(sites, projections):
                self._shelf[f"{number + 1}.{name}"] = self._runner.run(number, self._batch, hidden)
        self._shelf.settle(number + 1)

    @torch.no_grad()
    def expected(self) -> tuple[torch.Tensor, float]:
        """Return the logits of the masked model, or the hidden states of a model without a head, and the largest
        change of these by a rounding error in the embeddings, as a fraction of their scale."""
        masked, with_error = (
            self._runner.logits(self._batch, self._shelf[f"{self._shelf.settled}.{name}"])
            for name in ("masked", "rounded")
        )
        return masked, share_of_scale(masked, with_error)
