"""Requests that together run every method and every reconstruction once, for checks of a device on a tiny model.

Every entry names its `kinds` and its `reconstruction`, so that it asks for the same whatever the defaults are. The
requests are sized for a model of three layers and 16 windows of 24 tokens.
"""

from typing import Any


BOTH: dict[str, Any] = {"kinds": ["attention", "mlp"]}
NONE: dict[str, Any] = {**BOTH, "reconstruction": "none"}
LEAST_SQUARES: dict[str, Any] = {**BOTH, "reconstruction": "least_squares"}
SEQUENTIAL: dict[str, Any] = {**LEAST_SQUARES, "reconstruction_order": "sequential"}

# Name -> fields of `PruningConfig`.
_FIELDS: dict[str, dict[str, Any]] = {
    # wanda_sp, the default method, with every reconstruction
    "none": NONE,
    "bias": {**BOTH, "reconstruction": "bias"},
    "sequential": SEQUENTIAL,
    "independent": {**LEAST_SQUARES, "reconstruction_order": "independent"},
    "target layer": {**SEQUENTIAL, "reconstruction_target": "layer"},
    "fixed ridge": {**SEQUENTIAL, "ridge": 0.01},
    "refit sources": {**SEQUENTIAL, "refit_sources": True},
    "refit MLP sources": {**SEQUENTIAL, "kinds": ["mlp"], "refit_sources": True, "sparsity": 0.3, "ridge": 3.0},
    # the other methods
    "flap global": {**BOTH, "method": "flap", "scope": "global", "budget": "joint", "reconstruction": "bias"},
    "magnitude": {**NONE, "method": "magnitude"},
    "random": {**NONE, "method": "random"},
    "taylor": {**SEQUENTIAL, "method": "taylor"},
    "mini_llm weights": {**NONE, "method": "mini_llm", "perturb": "weights", "draws": 4},
    "mini_llm units": {**SEQUENTIAL, "method": "mini_llm", "perturb": "units", "draws": 12},
    "mini_llm exact": {**NONE, "method": "mini_llm", "gradient": "exact"},
    "mini_llm ones": {**NONE, "method": "mini_llm", "gradient": "ones"},
    "policy_gradient ratio": {
        **SEQUENTIAL,
        "method": "policy_gradient",
        "parametrization": "ratio",
        "steps": 3,
        "learning_rate": 0.1,
    },
    "policy_gradient unit": {**NONE, "method": "policy_gradient", "parametrization": "unit", "steps": 3},
    # budgets, and what a plan must hold to
    "search": {**SEQUENTIAL, "scope": "search", "search_windows": 80, "budget": "joint"},
    "rounds": {**SEQUENTIAL, "rounds": 2},
    "target speedup": {**NONE, "target_speedup": 1.05, "latency_tokens": 16, "scope": "global"},
    "KV groups": {**NONE, "attention_unit": "kv_group"},
    "multiple_of": {**SEQUENTIAL, "multiple_of": 8},
    # calibration that the model writes itself: give no tokens
    "self": {**NONE, "calibration": "self", "n_samples": 4, "seq_len": 12},
}

# The same beside `COMMON`, with a sparsity where there is no target.
COMMON: dict[str, Any] = {"seed": 3}
REQUESTS: dict[str, dict[str, Any]] = {
    name: fields if "target_speedup" in fields else {"sparsity": 0.4, **fields} for name, fields in _FIELDS.items()
}
