"""The options of every request, with their defaults, their help texts and their allowed values."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .choices import (
    AttentionUnit,
    BudgetSharing,
    Choice,
    Layout,
    ReconstructionKind,
    ReconstructionOrder,
    ReconstructionTarget,
    Scope,
    UnitKind,
)
from .registry import METHODS


DEFAULT_METHOD = "wanda_sp"


class Heading(Choice):
    """The heading that an option has in the help of the command line."""

    METHOD = "method"
    BUDGET = "budget"
    SHARES = "how the budget is shared"
    SEARCH = "search, with --scope search"
    UNITS = "what is pruned"
    RECONSTRUCTION = "reconstruction"
    CALIBRATION = "calibration"
    RUNNING = "interrupt and resume"


def option(default: Any, help: str, choices: Iterable[str] | None = None, group: str | None = None) -> Any:
    """Declare a config field with its default, its help text and, where it has them, its allowed values.

    Args:
        default: its value where nobody says.
        help (`str`): what it does, for the command line.
        choices (iterable of `str`, *optional*): its allowed values; a [`Choice`] is one.
        group (`str`, *optional*): heading of the command line's help that it stands under; by default the method's.
    """
    metadata: dict[str, Any] = {"help": help}
    if choices is not None:
        metadata["choices"] = tuple(map(str, choices))
    if group is not None:
        metadata["group"] = group
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=str(default) if isinstance(default, Choice) else default, metadata=metadata)


def field_type(hint: Any) -> tuple[Any, bool, bool]:
    """Reduce a field's annotation to its element type, whether it is a list, and whether it may be `None`."""
    is_optional = isinstance(hint, types.UnionType) and types.NoneType in typing.get_args(hint)
    if is_optional:
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True, is_optional
    return hint, False, is_optional


@dataclass
class Options:
    """The options that requests of all methods share."""

    method: str = option(DEFAULT_METHOD, "How units are scored.", group=Heading.METHOD)
    sparsity: float = option(
        0.2, "Fraction of the prunable parameters (all that heads and channels own) to remove.", group=Heading.BUDGET
    )
    target_parameters: int | None = option(
        None, "Instead of sparsity: parameters of the whole pruned model, at most.", group=Heading.BUDGET
    )
    target_bytes: int | None = option(
        None, "Instead of sparsity: bytes of the pruned weights on disk, at most.", group=Heading.BUDGET
    )
    target_speedup: float | None = option(
        None,
        "Instead of sparsity: how many times as fast as the dense model the pruned one must be at a prefill, by "
        "latencies of layers that are measured on this machine.",
        group=Heading.BUDGET,
    )
    latency_tokens: int = option(
        512, "Length of the prompt, one alone, that target_speedup is for.", group=Heading.BUDGET
    )
    latency_table: str | None = option(
        None,
        "File to keep the measured latencies in; target_speedup uses one that it finds there.",
        group=Heading.BUDGET,
    )
    attention_sparsity: float | None = option(
        None, "A budget of their own for the attention units.", group=Heading.BUDGET
    )
    mlp_sparsity: float | None = option(None, "A budget of their own for the MLP channels.", group=Heading.BUDGET)
    scope: str | None = option(
        None,
        "Whether every layer loses the same share (layer), layers compete for one budget (global), or the loss of "
        "whole pruned models decides what each site loses (search). Default: layer, and global for methods that learn "
        "how the budget is split, where layout is any.",
        Scope,
        group=Heading.SHARES,
    )
    search_windows: int = option(
        600,
        "Calibration windows that scope=search may pass through the model; the more, the better it ends.",
        group=Heading.SEARCH,
    )
    rounds: int = option(
        1, "Prune in so many rounds of equal size, and score what is left anew in each.", group=Heading.SHARES
    )
    budget: str = option(
        BudgetSharing.SEPARATE,
        "Whether attention and MLP each give their share, or compete for one budget.",
        BudgetSharing,
        group=Heading.SHARES,
    )
    kinds: list[str] | None = option(
        None,
        "Which kinds of units to prune. Default: mlp, and query heads too where attention_sparsity asks for them or "
        "the layers would lose more than 90 % of their channels.",
        UnitKind,
        group=Heading.UNITS,
    )
    attention_unit: str = option(
        AttentionUnit.QUERY_HEAD,
        "Under grouped-query attention: query heads, as many in every group, or a KV group with all its query heads.",
        AttentionUnit,
        group=Heading.UNITS,
    )
    layout: str = option(
        Layout.ANY,
        "stock: cut every layer alike, as far as a checkpoint that unmodified transformers loads can hold it.",
        Layout,
        group=Heading.UNITS,
    )
    multiple_of: int = option(
        1,
        "Round every pruned MLP width to a multiple of this, for fast kernels; layers round up or down so that all of "
        "them together come nearest to the budget.",
        group=Heading.UNITS,
    )
    skip_layers: list[int] | None = option(
        None,
        "Layers that stay unpruned; negative numbers count from the last, and an empty list means no layer. Default: "
        "the first and last two of models of 12 layers and more where scope is layer and layout is any, unless the "
        "other layers would lose more than 90 % of what is pruned in them.",
        group=Heading.UNITS,
    )
    min_units_per_site: int = option(1, "Heads and channels that every layer keeps at least.", group=Heading.UNITS)
    reconstruction: str = option(
        ReconstructionKind.LEAST_SQUARES,
        "How the kept weights make up for the removed ones: not at all (none), by a bias that replaces the mean "
        "output of what was removed (bias), or refitted by least_squares.",
        ReconstructionKind,
        group=Heading.RECONSTRUCTION,
    )
    reconstruction_order: str | None = option(
        None,
        "Whether least squares refits all projections on the dense model's activations, or layer by layer on those of "
        "the layers pruned before (default).",
        ReconstructionOrder,
        group=Heading.RECONSTRUCTION,
    )
    reconstruction_target: str | None = option(
        None,
        "What sequential least squares fits: what brings the residual stream back to the dense model's (default where "
        "the architecture allows it), or what the layer itself would have said.",
        ReconstructionTarget,
        group=Heading.RECONSTRUCTION,
    )
    refit_sources: bool = option(
        False,
        "Let sequential least squares refit what makes the features too: queries, keys and values so that they say "
        "what they said in the dense model, the linears before an activation so that the projection behind it comes "
        "nearer to its target.",
        group=Heading.RECONSTRUCTION,
    )
    ridge: float | None = option(
        None,
        "Ridge of least squares, as a share of the mean squared activation. Default: chosen per projection on "
        "held-out calibration windows.",
        group=Heading.RECONSTRUCTION,
    )
    calibration: str | None = option(
        None,
        "Calibration text: wikitext2, c4, self (sampled from the model), builtin (Python's documentation, for smoke "
        "runs), a .txt, .json, .jsonl or .parquet file, or a dataset of the Hub. Default: wikitext2 where the Hub or "
        "its cache answers, else self.",
        group=Heading.CALIBRATION,
    )
    dataset_config: str | None = option(None, "Configuration name of a Hub dataset.", group=Heading.CALIBRATION)
    dataset_split: str = option("train", "Split of a Hub dataset.", group=Heading.CALIBRATION)
    dataset_column: str | None = option(
        None,
        "Column of the text, the chat messages or the token ids. Default: found by its name.",
        group=Heading.CALIBRATION,
    )
    n_samples: int = option(128, "Calibration windows.", group=Heading.CALIBRATION)
    seq_len: int = option(256, "Tokens per calibration window.", group=Heading.CALIBRATION)
    batch_size: int = option(8, "Windows per forward pass.", group=Heading.CALIBRATION)
    seed: int = option(0, "Seed of everything random.", group=Heading.CALIBRATION)
    resume: str | None = option(
        None,
        "Folder for the state of long stages. The same request, run again, resumes from it.",
        group=Heading.RUNNING,
    )
    resume_seconds: float = option(
        60.0, "How often a stage writes its state; 0 writes after every step.", group=Heading.RUNNING
    )

    @property
    def resolved_scope(self) -> str:
        """The scope, with the default of `None` put in: `"layer"`, and `"global"` for methods that learn the split,
        where the layout allows it."""
        if self.scope is not None:
            return self.scope
        if self.layout == Layout.STOCK:
            return Scope.LAYER
        method = METHODS.get(self.method)
        return Scope.GLOBAL if method is not None and method.learns_split else Scope.LAYER

    @property
    def resolved_kinds(self) -> list[str]:
        """The kinds, with the default of `None` put in: `["mlp"]`, and attention where it has a budget of its own."""
        if self.kinds is not None:
            return self.kinds
        return [UnitKind.MLP] if self.attention_sparsity is None else list(UnitKind)

    @property
    def has_budget_per_kind(self) -> bool:
        """Whether attention and MLP have budgets of their own."""
        return self.attention_sparsity is not None or self.mlp_sparsity is not None

    def sparsity_of(self, kind: str) -> float:
        """Return the sparsity asked for `"attention"` or `"mlp"`."""
        sparsity: float = getattr(self, self.field_of(kind))
        return sparsity

    def field_of(self, kind: str) -> str:
        """Return the name of the field that `sparsity_of` is from."""
        return "sparsity" if getattr(self, f"{kind}_sparsity") is None else f"{kind}_sparsity"
