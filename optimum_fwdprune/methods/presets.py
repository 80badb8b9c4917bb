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
    "As balanced, how many channels each layer gives is searched for with whole pruned models, and what makes the "
    "features is refitted too: the longest (docs/quality.md).",
    kinds=["mlp"],
    scope="search",
    search_windows=1500,
    reconstruction="least_squares",
    refit_sources=True,
)
