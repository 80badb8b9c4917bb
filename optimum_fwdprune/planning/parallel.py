"""The check of `tensor_parallel`: whether devices can share every layer of the dense model."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..architectures import head_counts
from ..loading.subject import Subject
from ..request.choices import UnitKind
from ..request.config import PruningConfig


def check_tensor_parallel(subject: Subject, config: PruningConfig) -> None:
    """Raise `ValueError` where `tensor_parallel` devices cannot share the layers of a model equally.

    Every device computes a part of the heads with their keys and values, and a part of the channels. Layers that are
    not pruned keep the numbers of the dense model.
    """
    devices = config.tensor_parallel
    sizes = list(_shared_sizes(subject)) if devices > 1 else []
    for layer, units, number in sizes:
        if number % devices:
            common = math.gcd(*(size for _, _, size in sizes))
            possible = [str(count) for count in range(1, common + 1) if common % count == 0]
            raise ValueError(
                f"tensor_parallel={devices} splits every layer over {devices} devices, and layer {layer} has {number} "
                f"{units}, which {devices} does not divide. Numbers of devices that divide all sizes of this model: "
                f"{', '.join(possible)}."
            )


def _shared_sizes(subject: Subject) -> Iterator[tuple[int, str, int]]:
    """Yield the sizes that devices share: the layer, what is counted, and the number."""
    layers, attention = subject.layers, subject.architecture.layout.attention
    for site in subject.sites:
        if site.routing is not None:
            yield site.layer, "channels per expert", site.routing.output_weight(0).shape[1]
        elif site.kind == UnitKind.MLP:
            yield site.layer, "MLP channels", site.num_units
        else:
            counts = head_counts(attention, layers[site.layer])
            yield site.layer, "query heads", counts.heads
            yield site.layer, "KV groups", counts.kv_heads
