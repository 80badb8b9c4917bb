"""Named requests by what they cost; the study behind them is docs/quality.md."""

from ..configuration import register_preset


register_preset(
    "fast",
    "Statistics only: minutes, about three times the forward passes over the calibration text.",
    reconstruction_order="independent",
)
register_preset("balanced", "What prune() does without a request.")
register_preset(
    "best",
    "How much each layer gives is searched for by the divergence of whole pruned models: the longest, and the best.",
    scope="search",
    budget="joint",
    search_windows=600,
)
