"""The first options of every request: the methods, and the budgets."""

from __future__ import annotations

from dataclasses import dataclass

from .choices import WIDTH_KINDS, DepthKind, Phase, UnitKind
from .fields import Heading, option


DEFAULT_METHOD = "wanda_sp"
DEFAULT_DEPTH_METHOD = "block_influence"
DEFAULT_EXPERT_METHOD = "reap"

# Options that are budgets for the whole model.
TARGETS = ("target_parameters", "target_active_parameters", "target_bytes", "target_memory", "target_speedup")

# Options that are sizes in bytes, which may be written with a unit.
SIZES = ("target_bytes", "target_memory")

# Options that are large numbers, which may be written as 32K, 500M or 5B.
COUNTS = ("target_parameters", "target_active_parameters", "context_tokens", "latency_tokens", "latency_context")

# Options that are limits of quality, within which the smallest model is searched for.
LIMITS = ("max_perplexity_ratio", "max_divergence")


def default_method(kinds: object) -> str:
    """Return the method of a request that names none, by its `kinds`."""
    named = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, (list, tuple)) else ()
    if any(kind in named for kind in WIDTH_KINDS):
        return DEFAULT_METHOD
    if UnitKind.EXPERT in named:
        return DEFAULT_EXPERT_METHOD
    return DEFAULT_DEPTH_METHOD if any(kind in named for kind in DepthKind) else DEFAULT_METHOD


@dataclass
class BudgetOptions:
    """The options for the methods and budgets of a request."""

    method: str = option(DEFAULT_METHOD, "How units are scored.", group=Heading.METHOD)
    depth_method: str | None = option(
        None,
        "Method that scores layers or sublayers if kinds includes attention, mlp or expert too. Default: "
        "block_influence.",
        group=Heading.METHOD,
    )
    expert_method: str | None = option(
        None,
        "Method that scores experts if kinds includes attention or mlp too. Default: reap.",
        group=Heading.METHOD,
    )
    sparsity: float = option(
        0.2,
        "Fraction of the prunable parameters (all that heads, channels and experts of the kinds own) to remove. If "
        "kinds is only layer or only sublayer: fraction of the layers or sublayers to remove. If it is expert: "
        "fraction of the experts.",
        group=Heading.BUDGET,
    )
    target_parameters: int | None = option(
        None,
        "Largest number of parameters of the whole pruned model, such as 5B. Replaces sparsity.",
        group=Heading.BUDGET,
    )
    target_active_parameters: int | None = option(
        None,
        "Largest number of parameters of the whole pruned model that a token uses: all but those of the experts that "
        "it is not routed to. Replaces sparsity.",
        group=Heading.BUDGET,
    )
    target_bytes: int | None = option(
        None, "Largest size of the pruned weights on disk, in bytes. Replaces sparsity.", group=Heading.BUDGET
    )
    target_memory: int | None = option(
        None,
        "Largest memory of the pruned model while it serves, such as 6GB or a number of bytes: weights, KV cache, and "
        "the largest activations of a prefill, for serving_batch prompts of context_tokens tokens. Replaces sparsity.",
        group=Heading.BUDGET,
    )
    context_tokens: int = option(
        2048,
        "Tokens of every prompt that target_memory refers to, new tokens included, such as 32768 or 32K, which is "
        "32,000.",
        group=Heading.BUDGET,
    )
    serving_batch: int = option(1, "Number of prompts at a time that target_memory refers to.", group=Heading.BUDGET)
    target_speedup: float | None = option(
        None,
        "Smallest speed-up over the dense model, such as 1.5, according to latencies of layers that are measured on "
        "this machine. speed_of names what becomes faster. Replaces sparsity.",
        group=Heading.BUDGET,
    )
    speed_of: str = option(
        Phase.PREFILL,
        "What target_speedup refers to: the pass over a prompt (prefill), a pass over one new token with a KV cache "
        "(decode), or the sum of both, with the shares of the dense model's time that each takes "
        "(prefill:0.3,decode:0.7).",
        group=Heading.BUDGET,
    )
    latency_tokens: int = option(
        512, "Tokens of the prompt that target_speedup refers to; its batch size is 1.", group=Heading.BUDGET
    )
    latency_context: int | None = option(
        None,
        "Tokens in the KV cache in front of the new token, with speed_of=decode. Default: latency_tokens.",
        group=Heading.BUDGET,
    )
    latency_table: str | None = option(
        None,
        "File for the latencies that target_speedup measures. If it exists, they are read and not measured again. It "
        "may hold latencies of another program, such as llama.cpp.",
        group=Heading.BUDGET,
    )
    max_perplexity_ratio: float | None = option(
        None,
        "Largest perplexity, as a multiple of the dense model's, on calibration windows that are held out, such as "
        "1.1; the smallest model within it is made. Replaces sparsity.",
        group=Heading.BUDGET,
    )
    max_divergence: float | None = option(
        None,
        "Largest divergence from the dense model's next-token distribution on calibration windows that are held out, "
        "in nats per token; the smallest model within it is made. Replaces sparsity.",
        group=Heading.BUDGET,
    )
    attention_sparsity: float | None = option(
        None, "Sparsity of the attention units, where it differs from that of the MLP channels.", group=Heading.BUDGET
    )
    mlp_sparsity: float | None = option(
        None, "Sparsity of the MLP channels, where it differs from that of the attention units.", group=Heading.BUDGET
    )
    depth_sparsity: float | None = option(
        None,
        "If kinds includes layer or sublayer in addition to attention, mlp or expert: fraction of the layers or "
        "sublayers to remove. Heads, channels and experts lose the rest of the budget. Default: scope=search finds "
        "it, and with a target as few are removed as possible.",
        group=Heading.BUDGET,
    )
    expert_sparsity: float | None = option(
        None,
        "If kinds includes expert in addition to others: fraction of the experts to remove, where it differs from the "
        "share that other units lose. A target_active_parameters requires it.",
        group=Heading.BUDGET,
    )
