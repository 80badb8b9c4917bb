"""Noise that is generated again from its seed, and models that are perturbed by it without changing their weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from ...architectures import Site
from ...architectures.transposed import forward_replaced
from ...forward.gates import gated
from ...runs.devices import compute_device
from ...runs.randomness import seeded_generator
from ..choices import NoiseDistribution


@dataclass(frozen=True)
class Noise:
    """Noise with independent entries of mean 0 and variance 1; equal seed, draw and place have equal noise.

    Args:
        seed (`int`): seed of all draws.
        distribution (`str`, defaults to `"rademacher"`): `"rademacher"` (±1) or `"gaussian"`.
    """

    seed: int
    distribution: str = NoiseDistribution.RADEMACHER

    def tensor(
        self, shape: Sequence[int], draw: int, place: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Return the noise of `draw` for the tensor number `place`, which has this shape."""
        generator = seeded_generator(self.seed, draw, place, device=device)
        if self.distribution == NoiseDistribution.GAUSSIAN:
            return torch.randn(shape, generator=generator, dtype=torch.float32, device=device).to(dtype)
        count = math.prod(shape)
        # A random number has 64 signs; `bernoulli_` takes 40 times as long.
        numbers = torch.empty(-(-count // 64), dtype=torch.int64, device=device)
        octets = numbers.random_(-(2**63), None, generator=generator).view(torch.uint8)
        signs = F.embedding(octets.int(), _signs_of_octets(dtype, device))
        return signs.flatten()[:count].view(shape)


def generator_of(device: torch.device) -> str:
    """Return the name of the random number generator of `device`. Models of GPUs draw different numbers."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.lru_cache(maxsize=16)
def _signs_of_octets(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the eight bits of every byte as ±1, `[256, 8]`."""
    octets = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return ((octets & 1) * 2 - 1).to(dtype)


class Perturbation(Protocol):
    """Tensors of a model that a draw shifts along its noise `z`, without changing weights.

    Attributes:
        shapes (`list[torch.Size]`): shapes of the perturbed tensors.
        generators (`list[str]`): names of the generators that draw their noise; it depends on seed and generator.
    """

    shapes: list[torch.Size]

    @property
    def generators(self) -> list[str]: ...

    def noise(self, draw: int, index: int) -> torch.Tensor:
        """Return `z` of `draw` for the tensor `shapes[index]`, on `device(index)`."""

    def device(self, index: int) -> torch.device:
        """Return the device on which the tensor `shapes[index]` is used."""

    def applied(self, draws: Sequence[int], steps: Sequence[float]) -> AbstractContextManager[None]:
        """Within the context, shift sequence `i` of a batch by `steps[i]` times the noise of `draws[i]`.

        Sequences of the same draw must be neighbours.
        """


class WeightPerturbation:
    """Shifts every weight and bias that the units of some sites own a part of.

    Linears in 32 bits or more that are in memory use a temporary `W + step · z`. In 16 bits this sum would lose the
    noise to rounding, and the weights of offloaded linears cannot be read; for these linears, `step · x zᵀ` is added
    to the output.

    Args:
        sites (`list[Site]`): the sites.
        noise (`Noise`): the noise.
    """

    def __init__(self, sites: Sequence[Site], noise: Noise):
        self._noise = noise
        self._linears: list[tuple[str, nn.Linear, list[int]]] = []
        self._owners: list[nn.Linear] = []
        self._dtypes: list[torch.dtype] = []
        self.shapes: list[torch.Size] = []
        for coupling in (coupling for site in sites for coupling in site.couplings if coupling.is_linear):
            indices = []
            for _, parameter in coupling.parameters():
                indices.append(len(self.shapes))
                self.shapes.append(parameter.shape)
                self._dtypes.append(parameter.dtype)
                self._owners.append(coupling.linear)
            self._linears.append((coupling.name, coupling.linear, indices))

    @property
    def generators(self) -> list[str]:
        # Noise is drawn on the device that uses the weight. Drawing it on the CPU and moving it would take longer than
        # the forward pass.
        return sorted({generator_of(compute_device(owner)) for owner in self._owners})

    def noise(self, draw: int, index: int) -> torch.Tensor:
        return self._noise.tensor(self.shapes[index], draw, index, self._dtypes[index], self.device(index))

    def device(self, index: int) -> torch.device:
        return compute_device(self._owners[index])

    @contextmanager
    def applied(self, draws: Sequence[int], steps: Sequence[float]) -> Iterator[None]:
        runs = [
            _Run.of(list(rows)) for _, rows in groupby(zip(range(len(draws)), draws, steps), key=lambda row: row[1])
        ]
        called: set[str] = set()
        with ExitStack() as stack:
            for name, linear, indices in self._linears:
                noise = functools.partial(self._noise_of_linear, indices)
                mark = functools.partial(called.add, name)
                if _is_temporary_form_exact(linear):
                    # A hook would run the plain linear first and discard its output.
                    stack.enter_context(forward_replaced(linear, _temporary_form(linear, noise, runs, mark)))
                else:
                    stack.callback(linear.register_forward_hook(_additive_form(noise, runs, mark)).remove)
            yield
        bypassed = [name for name, _, _ in self._linears if name not in called]
        if called and bypassed:
            raise RuntimeError(f"The forward pass bypassed {bypassed[0]}, so that perturbing it had no effect.")

    def _noise_of_linear(self, indices: list[int], draw: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, *bias = (self.noise(draw, index) for index in indices)
        return weight, bias[0] if bias else None


class UnitPerturbation:
    """Shifts the gates of all units to `1 + step · z`; the gates of all sites are one vector.

    Args:
        sites (`list[Site]`): the sites, in the order of their units in the vector.
        noise (`Noise`): the noise.
    """

    def __init__(self, sites: Sequence[Site], noise: Noise):
        self._sites = list(sites)
        self._noise = noise
        self._sizes = [site.num_units for site in sites]
        self.shapes = [torch.Size([sum(self._sizes)])]
        self.generators = [generator_of(torch.device("cpu"))]

    def noise(self, draw: int, index: int) -> torch.Tensor:
        return self._noise.tensor(self.shapes[index], draw, index, torch.float32, self.device(index))

    def device(self, index: int) -> torch.device:
        return torch.device("cpu")

    def applied(self, draws: Sequence[int], steps: Sequence[float]) -> AbstractContextManager[None]:
        noise = {draw: self.noise(draw, 0) for draw in set(draws)}
        masks = torch.stack([1 + step * noise[draw] for draw, step in zip(draws, steps)])
        return gated(self._sites, dict(zip((site.key for site in self._sites), masks.split(self._sizes, dim=1))))

    def split(self, vector: torch.Tensor) -> dict:
        """Split `[..., all units]` into `[..., num_units]` by site key."""
        return dict(zip((site.key for site in self._sites), vector.split(self._sizes, dim=-1)))


@dataclass(frozen=True)
class _Run:
    """Neighbouring sequences of one draw, which end before `stop`, with a slice per step."""

    draw: int
    stop: int
    slices: list[tuple[float, slice]]

    @classmethod
    def of(cls, rows: list[tuple[int, int, float]]) -> _Run:
        slices = []
        for step, members in groupby(rows, key=lambda row: row[2]):
            positions = [position for position, _, _ in members]
            slices.append((step, slice(positions[0], positions[-1] + 1)))
        return cls(rows[0][1], rows[-1][0] + 1, slices)


def _temporary_form(linear: nn.Linear, noise: Callable, runs: list[_Run], mark: Callable):
    def forward(inputs: torch.Tensor) -> torch.Tensor:
        mark()
        # OPT calls its MLP linears with `[batch * tokens, features]`; this view fits both layouts.
        rows = inputs.reshape(runs[-1].stop, -1, inputs.shape[-1])
        outputs = rows.new_empty(*rows.shape[:-1], linear.out_features)
        buffer = torch.empty_like(linear.weight)
        for run in runs:
            z, z_bias = noise(run.draw)
            for step, members in run.slices:
                weight = torch.add(linear.weight, z, alpha=step, out=buffer)
                bias = linear.bias if z_bias is None or linear.bias is None else linear.bias + step * z_bias
                flat = outputs[members].flatten(0, 1)
                if bias is None:
                    torch.mm(rows[members].flatten(0, 1), weight.T, out=flat)
                else:
                    torch.addmm(bias, rows[members].flatten(0, 1), weight.T, out=flat)
        return outputs.view(*inputs.shape[:-1], linear.out_features)

    return forward


def _additive_form(noise: Callable, runs: list[_Run], mark: Callable):
    def hook(_module, args, output: torch.Tensor) -> torch.Tensor:
        mark()
        rows = args[0].to(output.device).reshape(runs[-1].stop, -1, args[0].shape[-1])
        shifted = output.reshape(len(rows), -1, output.shape[-1])
        for run in runs:
            z, z_bias = noise(run.draw)
            for step, members in run.slices:
                flat = shifted[members].flatten(0, 1)
                # The product is scaled inside addmm_, since `x zᵀ` may overflow in float16.
                flat.addmm_(rows[members].flatten(0, 1), z.T, alpha=step)
                if z_bias is not None:
                    flat.add_(z_bias, alpha=step)
        return shifted.view_as(output)

    return hook


def _is_temporary_form_exact(linear: nn.Linear) -> bool:
    resident = not (linear.weight.is_meta or any("forward" in vars(part) for part in linear.modules()))
    return resident and linear.weight.element_size() >= 4
