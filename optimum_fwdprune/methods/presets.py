"""Named requests by what they cost; the study behind them is docs/quality.md."""

from ..registry import register_preset


register_preset(
    "fast",
    "MLP channels, refitted all at once: about twice the time of the forward passes over the calibration text.",
    kinds=["mlp"],
    reconstruction_order="independent",
)
register_preset(
    "balanced",
    "MLP channels, every projection refitted layer by layer; what prune() does without a request.",
    kinds=["mlp"],
)
register_preset(
    "best",
    "As balanced, and what makes the channels is refitted too: three to four times as long (docs/quality.md).",
    kinds=["mlp"],
    reconstruction="least_squares",
    refit_sources=True,
)
