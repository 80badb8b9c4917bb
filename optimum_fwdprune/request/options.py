"""The options of every request, with their defaults, their help texts and their allowed values."""

from __future__ import annotations

from dataclasses import dataclass

from .budget_options import DEFAULT_DEPTH_METHOD, DEFAULT_EXPERT_METHOD, LIMITS, TARGETS, BudgetOptions
from .choices import (
    WIDTH_KINDS,
    AttentionUnit,
    BudgetSharing,
    DepthKind,
    Layout,
    Phase,
    ReconstructionKind,
    ReconstructionOrder,
    ReconstructionTarget,
    Scope,
    UnitKind,
)
from .fields import AUTO, Heading, option
from .gguf import GGUF_TYPES
from .registry import METHODS


@dataclass
class Options(BudgetOptions):
    """The options that requests of all methods share."""

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
        "Calibration windows that scope=search may pass through the model; more of them give a better result.",
        group=Heading.SEARCH,
    )
    rounds: int = option(
        1, "Number of rounds of equal size to prune in; each scores the remaining units again.", group=Heading.SHARES
    )
    budget: str = option(
        BudgetSharing.SEPARATE,
        "Whether attention and MLP have a budget each (separate), or compete for one budget (joint).",
        BudgetSharing,
        group=Heading.SHARES,
    )
    kinds: list[str] | None = option(
        None,
        "Which kinds of units to prune: attention heads, channels of the mlp, each expert of a mixture, whole layers, "
        "or sublayers, which are the attention or the MLP of a layer. Default: expert for mixtures of experts; mlp "
        "for other models, and query heads too where attention_sparsity asks for them or the layers would lose more "
        "than 90 % of their channels.",
        (*UnitKind, *DepthKind),
        group=Heading.UNITS,
    )
    attention_unit: str = option(
        AttentionUnit.QUERY_HEAD,
        "The unit of grouped-query attention: query heads, equally many of which are removed from every group, or a "
        "KV group with all its query heads.",
        AttentionUnit,
        group=Heading.UNITS,
    )
    layout: str = option(
        Layout.ANY,
        "any: layers may differ in size. alike: all layers get the same size. stock: they do, and the model can be "
        "exported to a checkpoint that transformers loads without this package.",
        Layout,
        group=Heading.UNITS,
    )
    multiple_of: int | str = option(
        AUTO,
        "Round every pruned MLP width to a multiple of this number, for fast kernels. auto is 64 where the weights "
        "are in 16 bit and the MLP has 2048 channels or more, else 1. Layers are rounded up or down so that their "
        "total comes closest to the budget.",
        group=Heading.UNITS,
    )
    for_gguf: str | None = option(
        None,
        "Type of the GGUF file that will be made of the model. The plan keeps to what llama.cpp requires: widths that "
        "the blocks of the type divide, and, depending on the family, layers of the same size with all heads.",
        GGUF_TYPES,
        group=Heading.UNITS,
    )
    tensor_parallel: int = option(
        1,
        "Number of devices over which tensor parallelism will split every layer: each layer keeps numbers of heads, "
        "KV groups and channels that this number divides.",
        group=Heading.UNITS,
    )
    skip_layers: list[int] | None = option(
        None,
        "Layers that stay unpruned; negative numbers count from the last, and an empty list means no layer. Default: "
        "the first two and last two of models with 12 layers or more where scope is layer and layout is any, unless "
        "the other layers would lose more than 90 % of their units.",
        group=Heading.UNITS,
    )
    min_units_per_site: int = option(
        1, "Smallest number of heads, of channels and of experts that every layer keeps.", group=Heading.UNITS
    )
    reconstruction: str = option(
        ReconstructionKind.LEAST_SQUARES,
        "How the kept weights make up for the removed ones: not at all (none), by a bias that replaces the mean "
        "output of the removed units (bias), or by refitting the projections (least_squares).",
        ReconstructionKind,
        group=Heading.RECONSTRUCTION,
    )
    reconstruction_order: str | None = option(
        None,
        "Whether least squares refits all projections on the dense model's activations (independent), or layer by "
        "layer on those of the layers that are pruned already (sequential, the default).",
        ReconstructionOrder,
        group=Heading.RECONSTRUCTION,
    )
    reconstruction_target: str | None = option(
        None,
        "What sequential least squares fits: the residual stream of the dense model (dense, the default where "
        "projections write to the stream without a norm in between), or the output of the unpruned layer for the "
        "same input (layer).",
        ReconstructionTarget,
        group=Heading.RECONSTRUCTION,
    )
    refit_sources: bool = option(
        False,
        "Let sequential least squares also refit the linears before the output projections: queries, keys and values "
        "towards their outputs in the dense model, and the linears before an activation so that the projection after "
        "it comes closer to its target.",
        group=Heading.RECONSTRUCTION,
    )
    ridge: float | None = option(
        None,
        "Ridge of least squares, as a fraction of the mean squared activation. Default: chosen for every projection "
        "on held-out calibration windows.",
        group=Heading.RECONSTRUCTION,
    )
    calibration: str | list[str] | None = option(
        None,
        "Calibration text: wikitext2, c4, self (sampled from the model), builtin (Python's documentation, for smoke "
        "runs), a .txt, .json, .jsonl or .parquet file, or a dataset of the Hub. Several of them, each with :WEIGHT "
        "if it is not 1, share n_samples. Default: wikitext2 if it is cached or the Hub can be reached, else self.",
        group=Heading.CALIBRATION,
    )
    dataset_config: str | None = option(None, "Configuration name of a Hub dataset.", group=Heading.CALIBRATION)
    dataset_split: str = option("train", "Split of a Hub dataset.", group=Heading.CALIBRATION)
    dataset_column: str | None = option(
        None,
        "Column of the text, the chat messages or the token ids. Default: detected by its name.",
        group=Heading.CALIBRATION,
    )
    n_samples: int | str = option(
        AUTO,
        "Number of calibration windows. auto is 128 or, where least squares refits wide projections, as many as hold "
        "16 tokens for each input feature of the widest, up to 262,144 tokens; less text is then used as it is.",
        group=Heading.CALIBRATION,
    )
    seq_len: int = option(256, "Tokens per calibration window.", group=Heading.CALIBRATION)
    batch_size: int = option(8, "Calibration windows per forward pass.", group=Heading.CALIBRATION)
    seed: int = option(0, "Seed of all random numbers.", group=Heading.CALIBRATION)
    resume: str | None = option(
        None,
        "Folder for the state of long stages. If a run is interrupted, the same request resumes from it.",
        group=Heading.RUNNING,
    )
    resume_seconds: float = option(
        60.0,
        "Seconds between two writes of a stage's state; 0 writes it after every step.",
        group=Heading.RUNNING,
    )

    @property
    def resolved_scope(self) -> str:
        """The scope; where it is `None`, `"global"` for methods that learn the split if the layout allows it, else
        `"layer"`."""
        if self.scope is not None:
            return self.scope
        if self.cuts_alike or self.prunes_experts:
            return Scope.LAYER
        if not self.width_kinds:
            return Scope.GLOBAL
        method = METHODS.get(self.method)
        return Scope.GLOBAL if method is not None and method.learns_split else Scope.LAYER

    @property
    def cuts_alike(self) -> bool:
        """Whether all layers get the same size."""
        return self.layout in (Layout.ALIKE, Layout.STOCK)

    @property
    def alike_by(self) -> str:
        """The option that makes all layers get the same size, with its value."""
        by_gguf = self.layout == Layout.ALIKE and self.for_gguf is not None
        return f"for_gguf={self.for_gguf!r}" if by_gguf else f"layout={self.layout!r}"

    @property
    def resolved_kinds(self) -> list[str]:
        """The kinds of the request. If `kinds` is `None`, these are `["mlp"]`, and also attention if it has its own
        budget; for a method that scores neither, it is the first kind that the method scores."""
        if self.kinds is not None:
            return self.kinds
        method = METHODS.get(self.method)
        if method is not None and UnitKind.MLP not in method.kinds:
            return [method.kinds[0]]
        return [UnitKind.MLP] if self.attention_sparsity is None else list(WIDTH_KINDS)

    @property
    def width_kinds(self) -> list[str]:
        """The kinds of units whose removal makes sites narrower: any of `"attention"` and `"mlp"`."""
        return [kind for kind in self.resolved_kinds if kind in WIDTH_KINDS]

    @property
    def num_windows(self) -> int:
        """`n_samples` as a number, in requests whose default number was replaced by that of a model."""
        assert isinstance(self.n_samples, int)
        return self.n_samples

    @property
    def prunes_experts(self) -> bool:
        """Whether the request removes experts of mixtures."""
        return UnitKind.EXPERT in self.resolved_kinds

    @property
    def unit_kinds(self) -> tuple[str, ...]:
        """The kinds of units that are scored one by one: heads and channels, experts, or both; none if the request is
        for layers or sublayers alone. The sparsity refers to their parameters."""
        experts = (UnitKind.EXPERT,) if self.prunes_experts else ()
        return (*(WIDTH_KINDS if self.width_kinds else ()), *experts)

    @property
    def depth_kind(self) -> str | None:
        """The kind that is removed as a whole, `"layer"` or `"sublayer"`; `None` if there is none."""
        return next((kind for kind in self.resolved_kinds if kind in list(DepthKind)), None)

    @property
    def depth_is_open(self) -> bool:
        """Whether the request leaves open how many layers or sublayers go beside heads, channels or experts."""
        return self.depth_kind is not None and bool(self.unit_kinds) and self.depth_sparsity is None

    @property
    def share_of_depth(self) -> float:
        """The fraction of the layers or sublayers to remove."""
        return (self.depth_sparsity or 0.0) if self.unit_kinds else self.sparsity

    @property
    def resolved_depth_method(self) -> str:
        """The method that scores layers or sublayers."""
        return (self.depth_method or DEFAULT_DEPTH_METHOD) if self.unit_kinds else self.method

    @property
    def resolved_expert_method(self) -> str:
        """The method that scores experts."""
        return (self.expert_method or DEFAULT_EXPERT_METHOD) if self.width_kinds else self.method

    @property
    def has_target(self) -> bool:
        """Whether the request is for a target of the whole model, and not for a sparsity."""
        return any(getattr(self, name) is not None for name in TARGETS)

    @property
    def limits_of_quality(self) -> list[str]:
        """The limits of quality that the request has; at most one."""
        return [name for name in LIMITS if getattr(self, name) is not None]

    @property
    def phase_tokens(self) -> dict[str, int]:
        """The tokens of the prompt, and those in the KV cache of a decoding step, by phase."""
        context = self.latency_tokens if self.latency_context is None else self.latency_context
        return {Phase.PREFILL: self.latency_tokens, Phase.DECODE: context}

    @property
    def has_budget_per_kind(self) -> bool:
        """Whether attention, MLP or experts have budgets of their own, and not parts of a common one."""
        sparsities = (self.attention_sparsity, self.mlp_sparsity, self.expert_sparsity)
        return not self.has_target and any(sparsity is not None for sparsity in sparsities)

    def sparsity_of(self, kind: str) -> float:
        """Return the requested sparsity of `"attention"`, `"mlp"` or `"expert"`."""
        sparsity: float = getattr(self, self.field_of(kind))
        return sparsity

    def field_of(self, kind: str) -> str:
        """Return the name of the field that holds the sparsity of a kind."""
        return "sparsity" if getattr(self, f"{kind}_sparsity") is None else f"{kind}_sparsity"
