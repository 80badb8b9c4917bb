"""Collecting statistics of all sites in one pass over the tokens, layer by layer if layers are offloaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from ..architectures import Site, SiteKey
from ..data.calibration import Calibration
from ..loading.offloading import input_device, inputs_of_model, is_offloaded, resident
from ..loading.subject import Subject
from ..runs.progress import progress
from ..runs.resume import Resume, State
from ..runs.shelves import Shelf
from .layerwise import LayerRunner
from .observer import Observer
from .statistics import MOMENTS, SiteStatistics


@torch.no_grad()
def statistics_by_layer(
    subject: Subject,
    texts: Sequence[Calibration],
    batch_size: int,
    kinds: Iterable[str],
    shelf: Shelf | None = None,
) -> Iterator[tuple[list[Site], list[dict[SiteKey, SiteStatistics]]]]:
    """Yield the sites of every layer with their statistics for every text, in one pass over the tokens.

    With several processes, each runs a share of the windows, and all yield the statistics of all windows. Memory holds
    the statistics of one layer, and the memory of the host the hidden states of all tokens. The parameters of a layer
    are in memory until the next layer is requested.

    Args:
        subject (`Subject`): the dense model, whose layers may be offloaded, with the sites to measure, layer by layer.
        texts (sequence of `Calibration`): the tokens.
        batch_size (`int`): number of windows per forward pass.
        kinds (iterable of `str`): the statistics to collect, of `KINDS_OF_STATISTICS`.
        shelf (`Shelf`, *optional*): storage for hidden states. It is settled after every layer, and an interrupted
            pass resumes after the last settled layer.
    """
    runner, shelf, kinds = LayerRunner(subject.model), shelf or Shelf(), list(kinds)
    shares = [text.own_share() for text in texts]
    batches = [[] if share is None else runner.batches(share, batch_size) for share in shares]
    places = [(text, number) for text, of_text in enumerate(batches) for number in range(len(of_text))]
    first = shelf.settled
    if first == 0:
        for text, number in places:
            shelf[f"0.{text}.{number}"] = runner.embed(batches[text][number])
        shelf.settle(0)
    by_layer = {layer: list(group) for layer, group in groupby(subject.sites, key=lambda site: site.layer)}
    for layer in range(first, len(runner.layers)):
        of_layer = by_layer.get(layer, [])
        observers = [Observer(of_layer, kinds) for _ in texts]
        with resident(runner.layers[layer]):
            # No statistics are needed after the last site.
            for text, number in places if layer <= max(by_layer, default=-1) else ():
                batch = batches[text][number]
                observers[text].attention_mask = batch.attention_mask
                with observers[text].watching():
                    hidden = runner.run(layer, batch, shelf.pop(f"{layer}.{text}.{number}"))
                shelf[f"{layer + 1}.{text}.{number}"] = hidden
            for observer in observers:
                observer.pool()
            yield of_layer, [observer.statistics() for observer in observers]
        shelf.settle(layer + 1)


def gather_statistics(
    subject: Subject,
    texts: Sequence[Calibration],
    batch_size: int,
    kinds: Iterable[str],
    resume: Resume | None = None,
) -> list[dict[SiteKey, SiteStatistics]]:
    """Return the statistics of every site for every text, as `collect_statistics` does, and read offloaded layers once
    instead of once per batch."""
    if not is_offloaded(subject.model.base_model):
        return [collect_statistics(subject, text, batch_size, kinds, resume) for text in texts]
    resume = resume or Resume()
    name = "statistics-by-layer"
    identity = {"texts": [text.fingerprint for text in texts], "kinds": sorted(kinds)}
    shelf = Shelf(resume.folder(f"{name}-hidden-states", about=identity))
    stage = resume.stage(name, about=identity)
    gathered = stage.load(_unpacked) or [{} for _ in texts]
    layers = statistics_by_layer(subject, texts, batch_size, kinds, shelf)
    total = len(subject.layers)
    for _, of_layer in progress(layers, "Calibrating", total=total, unit="layer", initial=shelf.settled):
        for all_layers, statistics in zip(gathered, of_layer):
            all_layers |= statistics
        # Statistics are stored before the hidden states of their layer are dropped.
        stage.save(lambda: _packed(gathered))
    shelf.clear()
    return gathered


def _packed(gathered: list[dict[SiteKey, SiteStatistics]]) -> State:
    tensors: dict[str, torch.Tensor] = {}
    counts = []
    for text, statistics in enumerate(gathered):
        counts.append(next((of_site.count for of_site in statistics.values()), 0))
        for key, of_site in statistics.items():
            site = f"{text}.{key}"
            tensors |= {f"{site}.mean": of_site.mean, f"{site}.variance": of_site.variance}
            tensors |= {f"{site}.norm.{name}": norm for name, norm in of_site.source_norms.items()}
            if of_site.routed is not None:
                tensors[f"{site}.routed"] = of_site.routed
    return tensors, {"counts": counts}


def _unpacked(tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> list[dict[SiteKey, SiteStatistics]]:
    gathered: list[dict[SiteKey, SiteStatistics]] = [{} for _ in numbers["counts"]]
    for name in tensors:
        text, layer, kind, what = name.split(".", maxsplit=3)
        if what == "mean":
            site = name.removesuffix("mean")
            norms = {
                key.removeprefix(f"{site}norm."): norm
                for key, norm in tensors.items()
                if key.startswith(f"{site}norm.")
            }
            statistics = SiteStatistics(
                numbers["counts"][int(text)],
                tensors[name],
                tensors[f"{site}variance"],
                source_norms=norms,
                routed=tensors.get(f"{site}routed"),
            )
            gathered[int(text)][SiteKey(int(layer), kind)] = statistics
    return gathered


@torch.no_grad()
def collect_statistics(
    subject: Subject,
    calibration: Calibration,
    batch_size: int,
    kinds: Iterable[str] = (MOMENTS,),
    resume: Resume | None = None,
    with_gram: Collection[SiteKey] | None = None,
) -> dict[SiteKey, SiteStatistics]:
    """Run the calibration tokens through the model once and return the statistics of every site.

    With several processes, each runs a share of the windows, and all return the statistics of all windows.

    Args:
        subject (`Subject`): the dense model, which is not changed, with the sites to measure.
        calibration (`Calibration`): the tokens; statistics do not include padding.
        batch_size (`int`): number of windows per forward pass.
        kinds (iterable of `str`): the statistics to collect, of `KINDS_OF_STATISTICS`. Gram matrices take
            `in_features²` float32 numbers per site.
        resume (`Resume`, *optional*): where the sums so far are stored.
        with_gram (collection of site keys, *optional*): the sites whose Gram matrices are collected if these are
            among `kinds`; by default all.

    Raises:
        ValueError: where a projection was bypassed, or its inputs contain NaN or infinity.
    """
    model, kinds = subject.model, sorted(kinds)
    observer, device = Observer(subject.sites, kinds, with_gram), input_device(model)
    sums = {site.key: (*kinds, with_gram is None or site.key in with_gram) for site in subject.sites}
    stage = (resume or Resume()).stage(*_name_of_pass(calibration, sums), own=True)
    share, done = calibration.own_share(), stage.load(observer.take_up) or 0
    with observer.watching():
        batches = list(share.after(done).batches(batch_size)) if share is not None and done < len(share) else []
        before = -(-done // batch_size)
        bar = progress(batches, "Calibrating", total=before + len(batches), unit="batch", initial=before)
        for input_ids, attention_mask, inputs in bar:
            observer.attention_mask = attention_mask
            # The base model stops before the vocabulary projection, which no site needs.
            model.base_model(
                input_ids=input_ids.to(device),
                attention_mask=None if attention_mask is None else attention_mask.to(device),
                **inputs_of_model(model, inputs),
                use_cache=False,
            )
            done += len(input_ids)
            stage.save_now_and_then(lambda: (observer.sums(), {"windows": done}))  # noqa: B023  called at once
    observer.pool()
    return observer.statistics()


def _name_of_pass(calibration: Calibration, sums: Mapping[SiteKey, tuple]) -> tuple[str, Calibration]:
    """Return the name of the stage for a pass over these tokens, since a run may have several."""
    identity = json.dumps([calibration.fingerprint, *sums.items()])
    return f"statistics-{hashlib.sha256(identity.encode()).hexdigest()[:12]}", calibration
