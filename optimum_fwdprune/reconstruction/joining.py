"""How the outputs of projections join the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from ..architectures import Site, SiteKey
from ..loading.subject import Subject


# Newton steps towards the multiplier of a constraint. Each one about doubles the digits.
NEWTON_STEPS = 12


@dataclass(frozen=True)
class Joining:
    """How the outputs of projections are added to the residual stream.

    Args:
        multiplier (`float`, defaults to 1.0): the number that they are multiplied by before they are added.
        norms (mapping of site key to `Module`): the RMS norms that they pass before, if they do.
    """

    multiplier: float = 1.0
    norms: Mapping[SiteKey, nn.Module] = field(default_factory=dict)

    @classmethod
    def of(cls, subject: Subject) -> Joining:
        """Return the values that the layout of a model declares."""
        layout, layers, norms = subject.architecture.layout, subject.layers, {}
        if layout.output_norm:
            norms = {
                site.key: layers[site.layer].get_submodule(layout.output_norm_of(site.key.sublayer))
                for site in subject.sites
            }
        return cls(layout.residual_multiplier(subject.text_config), norms)

    @property
    def normalized(self) -> bool:
        """Whether outputs pass a norm, so that the stream is not the sum of what projections write."""
        return bool(self.norms)

    def joined(self, site: Site, output: torch.Tensor) -> torch.Tensor:
        """Return what an output of the projection of a site adds to the stream, divided by `multiplier`."""
        return self.norms[site.key](output) if site.key in self.norms else output

    def gain(self, site: Site) -> torch.Tensor:
        """Return the weights that the norm of a site multiplies normalized values by, `[out_features]` float32.

        The layer of the site must be in memory.
        """
        # Some families store the weights less 1.
        return self.norms[site.key](torch.ones_like(site.weight[:1, :1]).expand(1, site.projection.out_features))[
            0
        ].float()


def output_before_norm(contribution: torch.Tensor, gain: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Return the output of a projection whose normalized value is nearest to a wanted contribution to the stream.

    An RMS norm with the weights g returns `g · u` for an output `s u`, where u has a root mean square of 1, and the
    number s has no effect. The nearest g · u is that of `u = g a / (g² + λ)`, where λ >= 0 is the multiplier of the
    constraint on u. With λ = 0 it has the direction of the contribution a. The result has the scale of the present
    output.

    Args:
        contribution (`Tensor[..., out_features]`): a, float32.
        gain (`Tensor[out_features]`): g, float32.
        output (`Tensor[..., out_features]`): the present output of the projection.

    Returns:
        `Tensor[..., out_features]`: the output, float32.
    """
    squares, radius = gain.square(), gain.numel() ** 0.5
    tiny = torch.finfo(torch.float32).tiny
    pulled = gain * contribution
    # An upper bound, from which the first step leads below the solution, and further steps approach it from there.
    multiplier = pulled.norm(dim=-1, keepdim=True) / radius
    for _ in range(NEWTON_STEPS):
        unit = pulled / (squares + multiplier).clamp_min(tiny)
        length = unit.norm(dim=-1, keepdim=True).clamp_min(tiny)
        slope = (unit.square() / (squares + multiplier).clamp_min(tiny)).sum(-1, keepdim=True).clamp_min(tiny)
        multiplier = (multiplier + (length / radius - 1) * length.square() / slope).clamp_min(0)
    unit = pulled / (squares + multiplier).clamp_min(tiny)
    return F.normalize(unit, dim=-1, eps=tiny) * output.float().norm(dim=-1, keepdim=True)
