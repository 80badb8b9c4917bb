"""A plan carried out on a model that is larger than memory: from the disk to the disk, one decoder layer at a time."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..allocation.plan import PruningPlan
from ..architectures import Site, SiteKey, get_architecture
from ..data.calibration import Calibration
from ..files import save_weights_atomically, write_text_atomically
from ..forward.gates import gated, replaced_projections
from ..forward.layerwise import LayerRunner
from ..forward.statistics import SiteStatistics
from ..loading.offloading import on_disk, read_parameter
from ..loading.saving import generation_config_as_it_is
from ..reconstruction.bias import kinds_with_bias
from ..reconstruction.reconstruct import reconstruct_by_layer, warn_of_unchanged
from ..reconstruction.reconstruction import Reconstruction
from ..request.choices import SEARCH
from ..request.config import PruningConfig
from ..runs import ranks
from ..runs.progress import progress
from ..runs.shelves import Shelf
from .cut import Cut, timed
from .surgery import (
    empty_pruned_model,
    plan_cuts,
    replaced_parameters,
    set_parameter,
    slice_tensor,
)
from .verification import (
    probe_batch,
    relative_difference,
    rounded,
    share_of_scale,
)


# In the folder that a model is cut in.
CHECKPOINT = "checkpoint"


class Workspace:
    """A folder for what a model that stays on disk is cut into.

    Args:
        parent (`str` or `Path`, *optional*): where to make one that is removed with this object; by default where the
            system keeps temporary files.
        kept (`Path`, *optional*): the folder itself, which stays, in its place.
    """

    def __init__(self, parent: str | Path | None = None, kept: Path | None = None):
        if kept is not None:
            self.folder = kept
            return
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
        self._temporary = tempfile.TemporaryDirectory(prefix=".fwdprune-", dir=parent)
        self.folder = Path(self._temporary.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspace:
        # Copies of a model read from the same files.
        return self


def files_of(model: PreTrainedModel) -> Path | None:
    """Return the folder of the files that `cut_streamed` wrote for a model, or `None` for any other model."""
    workspace: Workspace | None = model.__dict__.get("_workspace")
    return None if workspace is None else workspace.folder / CHECKPOINT


def check_streamable(config: PruningConfig) -> None:
    """Raise `ValueError` where a request asks for more than one layer of the model at a time."""
    if ranks.world_size() > 1:
        raise ValueError(
            f"low_memory=True runs in one process, and this is one of {ranks.world_size()}: start it without "
            f"accelerate launch, or leave low_memory out."
        )
    whole = {
        f"scope={SEARCH!r}": config.resolved_scope == SEARCH,
        f"rounds={config.rounds}": config.rounds > 1,
        "target_speedup": config.target_speedup is not None,
    }
    for name, asked in whole.items():
        if asked:
            raise ValueError(
                f"{name} runs whole models, and low_memory=True has one decoder layer in memory at a time. Leave one "
                f"of them out."
            )


@torch.no_grad()
def cut_streamed(
    model: PreTrainedModel,
    sites: list[Site],
    plan: PruningPlan,
    config: PruningConfig,
    calibration: Calibration | None,
    statistics: Mapping[SiteKey, SiteStatistics],
    workspace: Workspace,
    seconds: dict[str, float],
) -> Cut:
    """Reconstruct, cut, check and write layer after layer, and return the pruned model, whose layers stay on disk.

    What one layer needs is in memory at a time, beside embeddings and head. In the workspace are then the checkpoint,
    in one file of weights per layer and one for the rest, and what a run that was interrupted goes on from.

    Args:
        model (`PreTrainedModel`): the dense model in eval mode, its layers offloaded; it is not changed.
        sites (`list[Site]`): all its sites.
        plan (`PruningPlan`): what they keep.
        config (`PruningConfig`): the reconstruction.
        calibration (`Calibration`, *optional*): the tokens that it needs.
        statistics (mapping of site key to `SiteStatistics`): moments, where they were gathered before.
        workspace (`Workspace`): where to work; it lives as long as the pruned model.
        seconds (`dict[str, float]`): time by stage, added to.

    Raises:
        ValueError: where the plan does not fit the model.
        RuntimeError: where the pruned model does not compute what the masked one computes.
    """
    plan.check_matches(sites, model.config.model_type)
    folder = workspace.folder
    # The probe runs layers of both models, and dropout would make them differ.
    pruned = empty_pruned_model(model, sites, plan.kept, kinds_with_bias(sites, plan.kept, config)).eval()
    weights = _Weights(folder / CHECKPOINT, model, pruned)
    cuts = plan_cuts(sites, plan.kept)
    probe = _Probe(model, pruned, sites, plan, calibration, Shelf(folder / "probe"))
    with timed(seconds, "surgery"):
        weights.write_rest()
    shelf = Shelf(folder / "hidden_states")
    layers = enumerate(
        reconstruct_by_layer(model, sites, plan.kept, config, calibration, statistics, shelf=shelf), shelf.settled
    )
    total = len(get_architecture(model.config).layers(model))
    bar = progress(layers, "Cutting and writing", total=total, unit="layer", initial=shelf.settled)
    for number, found in _timed(bar, seconds, "reconstruct"):
        with timed(seconds, "surgery"):
            tensors = weights.write_layer(number, cuts, replaced_parameters(sites, found.projections), found.details)
        with timed(seconds, "verify"):
            probe.run(number, found, tensors)
    with timed(seconds, "verify"):
        difference = probe.difference()
    details = weights.finish()
    shelf.clear()
    warn_of_unchanged(sites, plan.kept, details)
    if details:
        plan = dataclasses.replace(plan, metadata={**plan.metadata, "reconstructed": details})
    loaded: PreTrainedModel = type(pruned).from_pretrained(
        weights.folder,
        device_map=on_disk(model, model.device),
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
    )
    # It reads its layers there whenever it runs, also when its pruner is gone.
    loaded.__dict__["_workspace"] = workspace
    # Where it lies now is nobody's business.
    loaded.config._name_or_path = model.config._name_or_path
    return Cut(loaded, plan, difference)


def _timed(found: Iterable[Any], seconds: dict[str, float], stage: str) -> Iterator[Any]:
    iterator = iter(found)
    while True:
        with timed(seconds, stage):
            item = next(iterator, None)
        if item is None:
            return
        yield item


class _Weights:
    """The weights of the pruned model, written in one file per layer and one for all else."""

    def __init__(self, folder: Path, model: PreTrainedModel, pruned: PreTrainedModel):
        self.folder = folder
        self._model, self._pruned = model, pruned
        self._layers = [f"{name}." for name, _ in get_architecture(model.config).layers(model)]
        tied: Mapping[str, str] = getattr(pruned, "all_tied_weights_keys", {})
        self._names = [name for name in pruned.state_dict() if name not in tied]

    def write_rest(self) -> None:
        """Write what belongs to no layer, unless it was."""
        if self._about(0).exists():
            return
        # All but weights, of which this state has none. It clears the folder of weights.
        with generation_config_as_it_is(self._pruned, self.folder):
            self._pruned.save_pretrained(self.folder, state_dict={})
        names = [name for name in self._names if not name.startswith(tuple(self._layers))]
        self._write(0, {name: read_parameter(self._model, name) for name in names}, {})

    def write_layer(
        self, number: int, cuts, replaced: dict[str, torch.Tensor], details: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Write what is left of a layer, and return it."""
        tensors = {}
        for name in self._names:
            if name.startswith(self._layers[number]):
                value = replaced.get(name)
                tensors[name] = slice_tensor(name, read_parameter(self._model, name), cuts) if value is None else value
        self._write(number + 1, tensors, details)
        return tensors

    def _write(self, part: int, tensors: dict[str, torch.Tensor], details: dict[str, Any]) -> None:
        save_weights_atomically(self._file(part), tensors)
        about = {"bytes": sum(tensor.nbytes for tensor in tensors.values()), "details": details}
        write_text_atomically(self._about(part), json.dumps(about))

    def finish(self) -> dict[str, Any]:
        """Write which file holds what, and return the details of every layer."""
        weight_map = {name: self._file(0).name for name in self._names}
        for number, prefix in enumerate(self._layers):
            weight_map |= {name: self._file(number + 1).name for name in self._names if name.startswith(prefix)}
        about = [json.loads(self._about(part).read_text(encoding="utf-8")) for part in range(len(self._layers) + 1)]
        metadata = {
            "total_parameters": sum(parameter.numel() for parameter in self._pruned.parameters()),
            "total_size": sum(part["bytes"] for part in about),
        }
        index = {"metadata": metadata, "weight_map": weight_map}
        write_text_atomically(self.folder / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2) + "\n")
        return {name: value for part in about for name, value in part["details"].items()}

    def _file(self, part: int) -> Path:
        return self.folder / f"model-{part + 1:05d}-of-{len(self._layers) + 1:05d}.safetensors"

    def _about(self, part: int) -> Path:
        return self.folder.parent / f"about-{part}.json"


class _Probe:
    """A few tokens on their way through the masked dense model and the pruned one, which must agree on them."""

    def __init__(
        self,
        model: PreTrainedModel,
        pruned: PreTrainedModel,
        sites: list[Site],
        plan: PruningPlan,
        calibration: Calibration | None,
        shelf: Shelf,
    ):
        self._runner, self._shelf = LayerRunner(model), shelf
        self._pruned = pruned
        self._pruned_layers = [layer for _, layer in get_architecture(model.config).layers(pruned)]
        self._sites, self._plan = sites, plan
        (self._batch,) = self._runner.batches(Calibration(probe_batch(model, calibration)), 2)
        if shelf.settled == 0:
            embedded = self._runner.embed(self._batch)
            shelf["0.masked"] = shelf["0.pruned"] = embedded
            shelf["0.rounded"] = rounded(embedded)
            shelf.settle(0)

    def run(self, number: int, found: Reconstruction, tensors: dict[str, torch.Tensor]) -> None:
        """Take the probe through a layer: masked and reconstructed on the fly, and as `tensors` have it."""
        if self._shelf.settled > number:
            return
        sites = [site for site in self._sites if site.layer == number]
        masks = {site.key: site.unit_mask(self._plan.kept[site.key]) for site in sites}
        for name in ("masked", "rounded"):
            with gated(sites, masks), replaced_projections(sites, found.projections):
                after = self._runner.run(number, self._batch, self._shelf.pop(f"{number}.{name}"))
            self._shelf[f"{number + 1}.{name}"] = after
        layer: nn.Module = self._pruned_layers[number]
        for name, value in tensors.items():
            set_parameter(self._pruned, name, value.to(self._runner.device), requires_grad=False)
        args, kwargs = self._batch.arguments[number]
        output = layer(self._shelf.pop(f"{number}.pruned").to(self._runner.device), *args, **kwargs)
        self._shelf[f"{number + 1}.pruned"] = output[0] if isinstance(output, tuple) else output
        layer.to("meta")
        self._shelf.settle(number + 1)

    def difference(self) -> float:
        """Return how far the logits of both are apart, as a fraction of their scale.

        Raises:
            RuntimeError: where that is more than rounding.
        """
        last = len(self._pruned_layers)
        masked, with_error, pruned = (
            self._runner.logits(self._batch, self._shelf[f"{last}.{name}"]) for name in ("masked", "rounded", "pruned")
        )
        return relative_difference(masked, pruned, share_of_scale(masked, with_error))
