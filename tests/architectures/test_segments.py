"""Segments of an axis: which positions stay, and which belong to a unit, whatever the order of the blocks."""

import pytest
import torch
from torch import nn

from optimum_fwdprune.architectures import Coupling, Segment


# Axes of four units, as who owns each position; -1 where no unit does.
AXES = {
    "one run": ((Segment(2),), [0, 0, 1, 1, 2, 2, 3, 3]),
    "gate rows and up rows": ((Segment(1), Segment(1)), [0, 1, 2, 3, 0, 1, 2, 3]),
    "shared keys": ((Segment(1), Segment(3, owned=False)), [0, 1, 2, 3, -1, -1, -1]),
    "two groups, each with its keys": (
        (Segment(1, range(2)), Segment(2, owned=False), Segment(1, range(2, 4)), Segment(2, owned=False)),
        [0, 1, -1, -1, 2, 3, -1, -1],
    ),
    "two blocks of query, value and key": (
        (Segment(1, range(2)),) * 3 + (Segment(1, range(2, 4)),) * 3,
        [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3],
    ),
}


@pytest.mark.parametrize(("segments", "owners"), AXES.values(), ids=AXES)
def test_segments_describe_who_owns_each_position(segments, owners):
    coupling = Coupling("linear", nn.Linear(1, len(owners)), 0, segments)
    values = torch.arange(2 * len(owners), dtype=torch.float32).view(2, -1) + 1
    expected = torch.stack([values[:, [owner == unit for owner in owners]].sum(1) for unit in range(4)], dim=1)

    for kept in ([0], [1, 2], [0, 3], [0, 1, 2, 3]):
        stays = [position for position, owner in enumerate(owners) if owner in (*kept, -1)]
        assert coupling.kept_index(4, kept).tolist() == stays
    assert torch.equal(coupling.sum_per_unit(4, values), expected)
    assert coupling.owned_width() == owners.count(0)
