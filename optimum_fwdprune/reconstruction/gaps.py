"""Gaps, which are removed sites one after the other, and what the projection before a gap can take over from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..architectures import Site, SiteKey
from ..data.calibration import Calibration
from ..forward.hooks import inputs_of, written_by
from ..forward.layerwise import Batch, LayerRunner
from ..loading.offloading import resident
from ..loading.subject import Subject
from ..runs import ranks
from ..runs.devices import compute_device, on_host, precise_device, precise_sum
from ..runs.progress import progress
from .joining import Joining, output_before_norm
from .least_squares import NormalEquations


@dataclass
class GapSums:
    """Sums over tokens of the inputs x of a projection in the dense model, and of the change g of its output that
    makes up for the gap after it.

    The change is the output of the gap. Where a norm follows the projection, it leads to the output whose normalized
    value is nearest to what the projection and the gap add to the stream.

    Args:
        cross (`Tensor[out_features, in_features]`): Σ g xᵀ, float32.
        energy (`Tensor[]`): Σ ‖g‖², float64.
    """

    cross: torch.Tensor
    energy: torch.Tensor

    @classmethod
    def empty(cls, site: Site) -> GapSums:
        """Return the sums over no tokens."""
        device = compute_device(site.projection)
        energy = torch.zeros((), dtype=torch.float64, device=precise_device(device))
        return cls(torch.zeros(site.projection.weight.shape, dtype=torch.float32, device=device), energy)

    def add(self, inputs: torch.Tensor, change: torch.Tensor) -> None:
        """Add tokens: `inputs`, `[tokens, in_features]`, and `change`, `[tokens, out_features]`."""
        inputs, change = (values.to(self.cross.device).float() for values in (inputs, change))
        self.cross.addmm_(change.T, inputs)
        self.energy += precise_sum(change.square())

    def pooled(self) -> GapSums:
        """Return the sums over the tokens of all processes of a run."""
        return GapSums(ranks.summed(self.cross), ranks.summed(self.energy))

    def joined(self, equations: NormalEquations, weight: torch.Tensor, kept: torch.Tensor) -> NormalEquations:
        """Return the equations of a projection for the residual `W_r x_r + g`: the output of its removed features
        and the change for the gap. This is the closed form of ReplaceMe (arXiv 2505.02819) where the projection loses
        no feature and no norm follows it.

        Args:
            equations (`NormalEquations`): those for the residual `W_r x_r`.
            weight (`Tensor[out_features, in_features]`): W.
            kept (`Tensor[in_features]`, bool): whether a feature is kept.
        """
        both = precise_sum(weight[:, ~kept].float() * self.cross[:, ~kept])
        energy = equations.energy + self.energy.to(equations.energy.device) + 2 * both
        return NormalEquations(equations.gram, equations.cross + self.cross[:, kept], energy, equations.count)


def gaps_of(sites: Sequence[Site], kept: Mapping[SiteKey, Sequence[int]]) -> dict[SiteKey, list[Site]]:
    """Return the removed sites directly after every site that keeps a unit, if there are any.

    Args:
        sites (sequence of `Site`): all sites of the dense model, in the order in which they write to the stream.
        kept (mapping of site key to sequence of `int`): the kept units.
    """
    gaps: dict[SiteKey, list[Site]] = {}
    before: Site | None = None
    for site in sites:
        if kept[site.key]:
            # Experts take over nothing.
            before = site if site.routing is None else None
        elif before is not None:
            gaps.setdefault(before.key, []).append(site)
    return gaps


@torch.no_grad()
def gap_sums(
    subject: Subject, gaps: Mapping[SiteKey, Sequence[Site]], texts: Sequence[Calibration], batch_size: int
) -> list[dict[SiteKey, GapSums]]:
    """Return the sums of every projection before a gap, by the key of its site, for every text.

    One pass over the tokens, layer by layer. The memory of the host holds the hidden states of all tokens, and for
    gaps that are not over yet, the inputs of the projection before them and their output so far. With several
    processes, each runs a share of the windows.

    Args:
        subject (`Subject`): the dense model with all its sites.
        gaps (mapping of site key to sequence of `Site`): the removed sites after a site.
        texts (sequence of `Calibration`): the tokens.
        batch_size (`int`): number of windows per forward pass.
    """
    runner, joining = LayerRunner(subject.model), Joining.of(subject)
    by_key = {site.key: site for site in subject.sites}
    shares = [text.own_share() for text in texts]
    sums = [{key: GapSums.empty(by_key[key]) for key in gaps} for _ in texts]
    tokens = [
        _Tokens(batch, runner, of_text, joining)
        for share, of_text in zip(shares, sums)
        for batch in ([] if share is None else runner.batches(share, batch_size))
    ]
    last = max(gap[-1].layer for gap in gaps.values())
    for number in progress(range(last + 1), "Measuring gaps", unit="layer"):
        of_layer = [site for site in subject.sites if site.layer == number]
        with resident(runner.layers[number]):
            for of_batch in tokens:
                of_batch.run(number, of_layer, gaps)
    return [{key: of_site.pooled() for key, of_site in of_text.items()} for of_text in sums]


@dataclass
class _Open:
    """A gap that is not over yet, at the tokens of a batch in the memory of the host.

    Args:
        inputs (`Tensor[tokens, in_features]`): inputs of the projection before the gap.
        added (`Tensor[tokens, out_features]`): what the gap has added to the stream so far, float32; where a norm
            follows the projection, together with the projection.
        output (`Tensor[tokens, out_features]`, *optional*): the output of the projection, where a norm follows it.
        gain (`Tensor[out_features]`, *optional*): the weights of this norm.
    """

    inputs: torch.Tensor
    added: torch.Tensor
    output: torch.Tensor | None = None
    gain: torch.Tensor | None = None

    def change(self) -> torch.Tensor:
        """Return the change of the projection's output that makes up for the gap."""
        if self.output is None or self.gain is None:
            return self.added
        return output_before_norm(self.added, self.gain, self.output) - self.output


class _Tokens:
    """The tokens of a batch on their way through the dense model."""

    def __init__(self, batch: Batch, runner: LayerRunner, sums: Mapping[SiteKey, GapSums], joining: Joining):
        self._batch, self._runner, self._sums, self._joining = batch, runner, sums, joining
        self._hidden = on_host(runner.embed(batch))
        self._open: dict[SiteKey, _Open] = {}

    def run(self, number: int, sites: Sequence[Site], gaps: Mapping[SiteKey, Sequence[Site]]) -> None:
        """Run the layer of `sites`, and add to the sums of gaps that end in it."""
        before = [site for site in sites if site.key in gaps]
        gone = {site.key: (key, site is gap[-1]) for key, gap in gaps.items() for site in gap}
        after = [site for site in sites if site.key in gone]
        with (
            inputs_of(site.projection for site in before) as inputs,
            written_by(site.output for site in before) as own,
            written_by(site.output for site in after) as outputs,
        ):
            self._hidden = on_host(self._runner.run(number, self._batch, self._hidden))
        for site, read, written in zip(before, inputs, own):
            self._open[site.key] = self._opened(site, read, written)
        for site, written in zip(after, outputs):
            key, is_last = gone[site.key]
            self._open[key].added += self._added(site, written)
            if is_last:
                gap = self._open.pop(key)
                self._sums[key].add(gap.inputs, gap.change())

    def _opened(self, site: Site, read: torch.Tensor, written: torch.Tensor) -> _Open:
        inputs = on_host(self._batch.tokens(read))
        if not self._joining.normalized:
            return _Open(inputs, torch.zeros(len(inputs), site.projection.out_features, dtype=torch.float32))
        output = on_host(self._batch.tokens(written)).float()
        return _Open(inputs, self._added(site, written), output, on_host(self._joining.gain(site)))

    def _added(self, site: Site, written: torch.Tensor) -> torch.Tensor:
        """Return what an output of the module of a site adds to the stream, `[tokens, out_features]` float32."""
        return on_host(self._batch.tokens(self._joining.joined(site, written))).float()
