"""Presets that go with every method, by what they cost; the study behind them is docs/quality.md.

A published method's own preset stands in that method's file.
"""

from ...request.registry import register_preset


register_preset(
    "fast",
    "Projections are refitted all at once: about twice the time of the forward passes over the calibration text.",
    reconstruction_order="independent",
)
register_preset(
    "balanced",
    "The defaults: MLP channels are pruned and every projection is refitted layer by layer.",
)
register_preset(
    "best",
    "The linears before the projections are refitted too: up to twice the time of balanced, and most gain from more "
    "text.",
    refit_sources=True,
)
