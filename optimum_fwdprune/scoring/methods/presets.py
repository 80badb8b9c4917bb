"""Presets for every method, by their cost; docs/benchmarks/quality.md has the study that they are based on.

The preset of a published method is in the method's file.
"""

from ...request.registry import register_preset


register_preset(
    "fast",
    "All projections are refitted at once, which takes about twice the time of the forward passes over the "
    "calibration text.",
    reconstruction_order="independent",
)
register_preset(
    "balanced",
    "The defaults: MLP channels are pruned and every projection is refitted layer by layer.",
)
register_preset(
    "best",
    "The linears before the projections are refitted too, which takes up to twice the time of balanced and gains most "
    "from more calibration text.",
    refit_sources=True,
)
