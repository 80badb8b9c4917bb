"""A switch for `benchmarks/presets.py`: targets after the norms that follow projections, instead of before them."""

from contextlib import contextmanager
from unittest import mock

import torch

from optimum_fwdprune.architectures import get_architecture
from optimum_fwdprune.reconstruction.streams import Stream


# The smallest absolute gain of a norm that targets are divided by.
SMALLEST_GAIN = 0.02


@contextmanager
def aimed_after_norms(model):
    """Within the context, sequential least squares aims at the dense model's residual stream.

    The output z of a projection joins the stream as g z / rms(z). The target is the z for which the stream becomes
    that of the dense model, with the size that z has there: rms(z of the dense model) (what the stream lacks) / g.
    """
    architecture = get_architecture(model.config)
    layers = [layer for _, layer in architecture.layers(model)]
    enter, settle = Stream.enter, Stream.settle

    def norm_of(site):
        return layers[site.layer].get_submodule(architecture.layout.sublayer(site.kind).norms[-1])

    def output_of(stream, site, place):
        return stream.shelf[f"{site.layer}.{stream.name}.{place}.output"]

    def enter_and_add_up(stream, sites):
        layer = sites[0].layer
        before = stream.shelf[f"{layer}.{stream.name}.dense"]
        enter(stream, sites)
        for place, site in enumerate(sites[:-1]):
            before = before + norm_of(site)(output_of(stream, site, place).view_as(before))
            stream.shelf[f"{layer}.{stream.name}.{place + 1}"] = before

    def settle_all(stream, sites, place):
        settle(stream, sites, place)
        if place + 1 < len(sites):
            stream.shelf.forget(f"{sites[0].layer}.{stream.name}.{place + 1}")

    def target(stream, sites, place, written, joining):
        site, norm = sites[place], norm_of(sites[place])
        lacking = stream._dense_target(site).float() - stream.shelf[f"{site.layer}.{stream.name}.pruned"].float()
        for earlier, output in zip(sites, written):
            lacking = lacking - norm_of(earlier)(output.view_as(lacking)).float()
        gain = norm(torch.ones(lacking.shape[-1], dtype=torch.float32))
        gain = torch.where(gain < 0, gain.clamp(max=-SMALLEST_GAIN), gain.clamp(min=SMALLEST_GAIN))
        size = output_of(stream, site, place).float().square().mean(-1, keepdim=True).sqrt()
        return size.view(*lacking.shape[:-1], 1) * lacking / gain

    with mock.patch.multiple(Stream, enter=enter_and_add_up, settle=settle_all, _target=target):
        yield
