"""Running calibration tokens through the pruned model and the dense model in parallel, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from ..architectures import Site, SiteKey
from ..architectures.transposed import forward_replaced
from ..forward.gates import Projection
from ..forward.hooks import inputs_of, leaves_of, outputs_of, stopped_before, written_by
from ..forward.layerwise import Batch, LayerRunner
from ..forward.narrowing import is_narrow, narrowed
from ..forward.replaying import PassedOn, passed_on, sublayer_of
from ..runs.devices import compute_device, on_host
from ..runs.shelves import Shelf
from .aims import Aims
from .experts import RoutedTokens
from .gauss_newton import Linearized
from .joining import Joining, output_before_norm


Projections = Mapping[SiteKey, Projection]


@dataclass(frozen=True)
class Stream:
    """A batch in the pruned model and, if the target needs it, in the dense model.

    The shelves hold the hidden states before layer `l`, `"<l>.<name>.pruned"` and `"<l>.<name>.dense"`. For layers
    that the dense model has run, they also hold `"<l>.<name>.<place>"`, the stream before the site with this index
    (from 1); and `"<l>.<name>.<place>.inputs"`, the inputs of the sources of the site. Where norms follow projections,
    they hold `"<l>.<name>.<place>.output"`, the output of one before a gap, and `"<l>.<name>.<place>.own"`, that of
    another, unpruned, in the pruned model. For sites that are final, they may hold
    `"<l>.<name>.<place>.features"`, the inputs of the projection, so that they are not computed again.

    Args:
        name (`str`): the name of the batch on the shelf.
        batch (`Batch`): the windows.
        runner (`LayerRunner`): the runner of the dense model.
        shelf (`Shelf`): storage for hidden states of the pruned model.
        joining (`Joining`, *optional*): how outputs are added to the stream, if the target is the dense model; `None`
            if it is the output of the unpruned projection.
        follows_inputs (`bool`): whether inputs of sources in the dense model are stored, too.
        stays_dense (`bool`): whether layers are run without their new projections, so that all of them are fitted on
            the dense model's hidden states.
        aims (`Aims`): the places in the dense model's stream that are the targets of projections.
        shared (`Shelf`, *optional*): storage for states of the dense model that other reconstructions use too, so that
            they are kept. By default they are stored in `shelf`, and removed after their last use.
    """

    name: str
    batch: Batch
    runner: LayerRunner
    shelf: Shelf
    joining: Joining | None
    follows_inputs: bool
    stays_dense: bool
    aims: Aims
    shared: Shelf | None = None
    _passed_on: dict[SiteKey, PassedOn] = field(default_factory=dict)
    # The sites of the current layer whose features are on the shelf.
    _with_features: set[SiteKey] = field(default_factory=set)
    # The sites of the current layer whose own outputs are on the shelf.
    _with_own: set[SiteKey] = field(default_factory=set)

    def start(self) -> None:
        """Store the hidden states of the batch before the first layer."""
        embedded = on_host(self.runner.embed(self.batch))
        self.shelf[f"0.{self.name}.pruned"] = embedded
        if self.joining is not None:
            self._dense[f"0.{self.name}.dense"] = embedded

    def enter(self, sites: Sequence[Site]) -> None:
        """Run the layer of `sites` in the dense model."""
        if self.joining is None:
            return
        layer, before = sites[0].layer, f"{sites[0].layer}.{self.name}.dense"
        stream = self._dense[before].to(self.runner.device_of(layer), non_blocking=True)
        self._forget_dense(before)
        readers = [site.sources[0].linear for site in sites] if self.follows_inputs else []
        sublayers = [sublayer_of(self.runner.model, site) for site in sites]
        with (
            written_by(site.output for site in sites) as outputs,
            outputs_of(sublayers) as whole,
            inputs_of(readers) as inputs,
        ):
            after = self.runner.run(layer, self.batch, stream)
        if len(outputs) == len(whole):
            found = zip(sites, sublayers, outputs, whole)
            forms = {site.key: passed_on(sublayer, output, result) for site, sublayer, output, result in found}
            self._passed_on.update({key: form for key, form in forms.items() if form is not None})
        for place, read in enumerate(inputs):
            self._dense[f"{layer}.{self.name}.{place}.inputs"] = read
        for place, (site, output) in enumerate(zip(sites, outputs)):
            if self._aims_before_norm(site):
                self._dense[f"{layer}.{self.name}.{place}.output"] = output
        for place, (site, output) in enumerate(zip(sites, outputs[:-1]), start=1):
            joined = self.joining.joined(site, output).view_as(stream)
            stream = stream + self.joining.multiplier * joined.to(stream.device)
            self._dense[f"{layer}.{self.name}.{place}"] = stream
        self._dense[f"{layer + 1}.{self.name}.dense"] = after

    def observe(
        self, sites: Sequence[Site], place: int, projections: Projections, keeps: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the kept inputs of a projection of the pruned model, `[tokens, kept]`, and the difference between its
        target and its present output, `[tokens, out_features]`.

        If `keeps` is set, the inputs are stored for the rest of the layer, where the site can be left out then.
        """
        inputs, written = self._run_before(sites[place].projection, sites, place, projections)
        site = sites[place]
        if keeps and site.key in self._passed_on:
            is_cut = is_narrow(site, projections)
            features = inputs if is_cut else inputs[..., site.kept_features(projections[site.key].kept)]
            self.shelf[f"{site.layer}.{self.name}.{place}.features"] = features
            self._with_features.add(site.key)
        return self._kept_and_left(sites, place, projections, inputs, written)

    def observe_experts(self, sites: Sequence[Site], place: int, projections: Projections) -> RoutedTokens:
        """Return the tokens before a mixture of the pruned model, with the difference between its target and its
        output, in the memory of the host."""
        site = sites[place]
        assert site.routing is not None
        calls: list[tuple[torch.Tensor, ...]] = []
        handle = site.routing.experts.register_forward_pre_hook(lambda _module, args: calls.append(args[:3]))
        try:
            with (
                narrowed(sites, projections),
                inputs_of([site.output]) as read,
                written_by(earlier.output for earlier in sites[: place + 1]) as written,
            ):
                self.runner.run(site.layer, self.batch, self.shelf[f"{site.layer}.{self.name}.pruned"])
        finally:
            handle.remove()
        *before, output = written
        if self.joining is None:
            with written_by([site.output]) as whole:
                site.output(read[0])
            target = whole[0].float()
        else:
            target = self._target(sites, place, projections, before)
        residual = self.batch.tokens(target) - self.batch.tokens(output).to(target.device).float()
        # Mixtures flatten the tokens of a batch.
        windows = read[0].shape[:2]
        hidden, indices, weights = (self.batch.tokens(values.view(*windows, -1)) for values in calls[0])
        return RoutedTokens(*(on_host(values) for values in (hidden, indices, weights, residual)))

    def read(self, sites: Sequence[Site], place: int, projections: Projections) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs of the sources of a site in the pruned model, and their difference from those in the dense
        model: both `[tokens, in_features]`."""
        inputs, _ = self._run_before(sites[place].sources[0].linear, sites, place, projections)
        dense = self._dense[f"{sites[place].layer}.{self.name}.{place}.inputs"].to(inputs.device)
        return self.batch.tokens(inputs), self.batch.tokens(dense).float() - self.batch.tokens(inputs).float()

    def linearize(self, sites: Sequence[Site], place: int, projections: Projections) -> Linearized:
        """Return the effect of small changes of the sources of a pointwise site on its projection's output, in the
        memory of the host."""
        site = sites[place]
        kept = projections[site.key].kept
        linears = [source.linear for source in site.sources]
        with inputs_of(linears[:1]) as read, leaves_of(linears) as outputs:
            features, written = self._run_before(site.projection, sites, place, projections)
            leaves = [outputs[linear] for linear in linears]
            # A feature depends on its own row only, so that the gradient of their sum has the derivatives of all.
            derivatives = torch.autograd.grad(features, leaves, torch.ones_like(features), materialize_grads=True)
        slopes = [self.batch.tokens(derivative) for derivative in derivatives]
        if not is_narrow(site, projections):
            rows = [source.kept_index(site.num_units, kept) for source in site.sources]
            slopes = [slope[:, of_source.to(slope.device)] for slope, of_source in zip(slopes, rows)]
        # A source may hold the rows of several linears, one after the other, as its segments.
        by_row = [segment for slope in slopes for segment in slope.split(len(kept), dim=1)]
        _, residual = self._kept_and_left(sites, place, projections, features.detach(), written)
        return Linearized.stored(self.batch.tokens(read[0]), torch.stack(by_row), residual)

    def settle(self, sites: Sequence[Site], place: int) -> None:
        """Drop what was stored for the target of a site, which is final."""
        layer = sites[0].layer
        if self._aims_before_norm(sites[place]):
            self._forget_dense(f"{layer}.{self.name}.{place}.output")
        if sites[place].key in self._with_own:
            self.shelf.forget(f"{layer}.{self.name}.{place}.own")
            self._with_own.remove(sites[place].key)
        if self.joining is not None and place + 1 < len(sites):
            self._forget_dense(f"{layer}.{self.name}.{place + 1}")
        if self.follows_inputs:
            self._forget_dense(f"{layer}.{self.name}.{place}.inputs")

    def follow_dense(self, layer: int) -> None:
        """Take the dense model's stream after a layer in which nothing has changed, nor in those before it."""
        self.shelf.forget(f"{layer}.{self.name}.pruned")
        self.shelf[f"{layer + 1}.{self.name}.pruned"] = self._dense[f"{layer + 1}.{self.name}.dense"]

    def leave(self, sites: Sequence[Site], projections: Projections) -> None:
        """Run the layer of `sites` in the pruned model, and drop its inputs."""
        layer = sites[0].layer
        pruned = self.shelf.pop(f"{layer}.{self.name}.pruned")
        projections = {} if self.stays_dense else projections
        with narrowed(sites, projections), self._replayed(sites, projections):
            self.shelf[f"{layer + 1}.{self.name}.pruned"] = self.runner.run(layer, self.batch, pruned)
        for place, site in enumerate(sites):
            if site.key in self._with_features:
                self.shelf.forget(f"{layer}.{self.name}.{place}.features")
        self._with_features.clear()

    @property
    def _dense(self) -> Shelf:
        """The storage for states of the dense model."""
        return self.shelf if self.shared is None else self.shared

    def _forget_dense(self, name: str) -> None:
        if self.shared is None:
            self.shelf.forget(name)

    def _run_before(
        self, module: nn.Module, sites: Sequence[Site], place: int, projections: Projections
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the layer in the pruned model up to `module`, and return its inputs and the outputs of earlier sites."""
        if self.joining is None:
            # The target is computed from the features of removed units.
            projections = {key: new for key, new in projections.items() if key != sites[place].key}
        earlier = sites[:place]
        computed = [site.output for site in earlier if site.key not in self._with_features]
        with (
            narrowed(sites, projections),
            written_by(computed) as written,
            self._replayed(earlier, projections) as known,
            stopped_before(module) as stop,
        ):
            self.runner.run(sites[0].layer, self.batch, self.shelf[f"{sites[0].layer}.{self.name}.pruned"])
        return stop.inputs, [*known, *written]

    @contextmanager
    def _replayed(self, sites: Sequence[Site], projections: Projections) -> Iterator[list[torch.Tensor]]:
        """Within the context, leave out the sublayers whose features are stored; yields the outputs of these sites."""
        outputs: list[torch.Tensor] = []
        with ExitStack() as stack:
            for place, site in enumerate(sites):
                if site.key not in self._with_features:
                    continue
                new = projections[site.key]
                features = self.shelf[f"{site.layer}.{self.name}.{place}.features"]
                outputs.append(F.linear(features.to(new.weight.device, non_blocking=True), new.weight, new.bias))
                form = self._passed_on[site.key]
                stack.enter_context(forward_replaced(form.sublayer, form.forward(outputs[-1])))
            yield outputs

    def _kept_and_left(self, sites, place, projections, inputs, written) -> tuple[torch.Tensor, torch.Tensor]:
        site, inputs = sites[place], self.batch.tokens(inputs)
        new, columns = projections[site.key], site.kept_features(projections[site.key].kept)
        if self.joining is None:
            return inputs[:, columns], F.linear(inputs[:, ~columns], site.projection.weight[:, ~columns])
        kept = inputs if is_narrow(site, projections) else inputs[:, columns]
        target = self._target(sites, place, projections, written).to(new.weight.device)
        return kept, self.batch.tokens(target) - F.linear(kept, new.weight, new.bias).float()

    def _target(self, sites, place, projections, written) -> torch.Tensor:
        """Return the output that the projection of a site should have for the pruned model's inputs, in float32."""
        site, joining, device = sites[place], self.joining, compute_device(sites[place].output)
        assert joining is not None
        if joining.normalized and not self._aims_before_norm(site):
            return self._own_output(sites, place, projections, joining.norms[site.key]).to(device).float()
        pruned = self.shelf[f"{site.layer}.{self.name}.pruned"]
        target = (self._dense_target(site).to(device).float() - pruned.to(device).float()) / joining.multiplier
        for earlier, output in zip(sites, written):
            target -= joining.joined(earlier, output).view_as(target).to(device).float()
        if not joining.normalized:
            return target
        own = self._dense[f"{site.layer}.{self.name}.{place}.output"].to(device).float()
        return output_before_norm(target, joining.gain(site), own.view_as(target))

    def _aims_before_norm(self, site: Site) -> bool:
        """Whether the target is the output before a norm that leads to the dense stream after a gap."""
        return self.joining is not None and self.joining.normalized and site.key in self.aims.before_gaps

    def _own_output(self, sites, place, projections, norm: nn.Module) -> torch.Tensor:
        """Return what the unpruned site writes before its norm, for the hidden states of the pruned model."""
        site, earlier = sites[place], sites[:place]
        name = f"{site.layer}.{self.name}.{place}.own"
        if site.key not in self._with_own:
            final = {before.key: projections[before.key] for before in earlier if before.key in projections}
            with narrowed(sites, final), self._replayed(earlier, final), stopped_before(norm) as stop:
                self.runner.run(site.layer, self.batch, self.shelf[f"{site.layer}.{self.name}.pruned"])
            self.shelf[name] = stop.inputs
            self._with_own.add(site.key)
        return self.shelf[name]

    def _dense_target(self, site: Site) -> torch.Tensor:
        aim = self.aims.of(site)
        if aim.is_last:
            return self._dense[f"{aim.layer + 1}.{self.name}.dense"]
        return self._dense[f"{aim.layer}.{self.name}.{aim.place + 1}"]
