"""What `for_gguf` requires of a request, checks before the work, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..allocation.budgets import counted_sites
from ..allocation.plan import PruningPlan
from ..allocation.widths import channel_multiple
from ..architectures import Site, SiteKey, head_counts, is_pruned
from ..architectures.gguf import GGUFRules, gguf_rules
from ..cutting.form import pruned_config
from ..loading.subject import Subject
from ..models.per_layer import stock_config
from ..reconstruction.bias import kinds_gaining_bias
from ..request.choices import DepthKind, Layout, ReconstructionKind, Scope, UnitKind
from ..request.config import PruningConfig
from ..request.gguf import GGUF_TYPES


# What the rows of output projections consist of, by the kind of the site.
ROWS: dict[str, str] = {UnitKind.ATTENTION: "heads", UnitKind.MLP: "MLP", UnitKind.EXPERT: "each expert"}


def with_gguf_layout(subject: Subject, config: PruningConfig) -> PruningConfig:
    """Return the request with layers of the same size where `for_gguf` requires them.

    Raises:
        ValueError: where llama.cpp has no code for the model, or the request makes layers differ in size.
    """
    if config.for_gguf is None:
        return config
    rules = _rules_of(subject)
    if rules.per_layer is not None or config.layout != Layout.ANY or not config.width_kinds:
        return config
    if config.resolved_scope == Scope.SEARCH or config.scope == Scope.GLOBAL or config.skip_layers:
        differ = f"skip_layers={config.skip_layers}" if config.skip_layers else f"scope={config.resolved_scope!r}"
        raise ValueError(
            f"for_gguf={config.for_gguf!r} needs layers of the same size, which llama.cpp's {rules.uniform} has, and "
            f"{differ} makes them differ. Set scope='layer' and skip_layers=[] (--scope layer --skip_layers)."
        )
    return replace(config, layout=Layout.ALIKE.value)


def check_gguf_request(subject: Subject, config: PruningConfig) -> None:
    """Raise `ValueError` where llama.cpp cannot hold what a request leaves of a model."""
    if config.for_gguf is None:
        return
    rules, option = _rules_of(subject), f"for_gguf={config.for_gguf!r}"
    if rules.all_heads and UnitKind.ATTENTION in config.width_kinds:
        other = UnitKind.EXPERT if any(site.routing is not None for site in subject.sites) else UnitKind.MLP
        raise ValueError(
            f"{option} does not allow pruning attention heads of this model: llama.cpp's {rules.uniform} takes all "
            f"heads together to be as wide as the hidden size. Use kinds=['{other.value}']."
        )
    if rules.all_heads:
        _check_all_heads(subject, rules, option)
    if rules.per_layer is None and config.depth_kind == DepthKind.SUBLAYER:
        raise ValueError(
            f"{option} does not allow removing sublayers of this model: every layer of llama.cpp's {rules.uniform} "
            f"has attention and MLP. Use kinds=['layer']."
        )
    if config.reconstruction == ReconstructionKind.BIAS and not rules.output_biases:
        raise ValueError(
            f"{option} cannot be combined with reconstruction='bias' for this model: llama.cpp's {rules.uniform} has "
            f"no biases in the projections that gain them. Set reconstruction='least_squares' or 'none'."
        )
    dense = [site.layer for site in subject.sites if site.kind == UnitKind.MLP]
    if dense and any(site.routing is not None for site in subject.sites):
        raise ValueError(
            f"{option} needs experts in every layer, and layer {dense[0]} of this model has one MLP in their place. "
            f"Leave out for_gguf."
        )
    sizes = {(site.kind, site.num_units, _row_length(site, site.num_units)) for site in subject.sites}
    sublayers_gone = len(subject.sites) < 2 * len(subject.layers)
    if rules.per_layer is None and (sublayers_gone or len(sizes) > len({kind for kind, _, _ in sizes})):
        raise ValueError(
            f"{option} needs layers of the same size, which llama.cpp's {rules.uniform} has, and those of this model "
            f"differ: it was pruned before. Prune the dense model with {option}."
        )


def _check_all_heads(subject: Subject, rules: GGUFRules, option: str) -> None:
    """Raise `ValueError` where a model has lost heads before that llama.cpp needs."""
    needed, attention = _stock_config(subject).num_attention_heads, subject.architecture.layout.attention
    for site in subject.sites:
        if site.kind != UnitKind.ATTENTION:
            continue
        heads = head_counts(attention, subject.layers[site.layer]).heads
        if heads != needed:
            raise ValueError(
                f"{option} needs all {needed} heads of this model, because llama.cpp's {rules.uniform} takes them "
                f"together to be as wide as the hidden size, and layer {site.layer} has {heads}: it was pruned "
                f"before. Prune the dense model with {option}."
            )


def check_gguf_plan(subject: Subject, plan: PruningPlan, reconstruction: str) -> None:
    """Raise `ValueError` where llama.cpp would compute something else than the model that a plan leaves.

    Args:
        subject (`Subject`): the model with all its sites.
        plan (`PruningPlan`): the plan.
        reconstruction (`str`): kind of reconstruction, which may add biases.
    """
    with_bias = kinds_gaining_bias(subject.sites, plan.kept, reconstruction)
    config = stock_config(pruned_config(subject, plan.kept, with_bias))
    gguf_rules(config).check(config)


def costs_of_gguf(
    subject: Subject,
    config: PruningConfig,
    kept: Mapping[SiteKey, list[int]],
    without: Mapping[SiteKey, list[int]] | None,
) -> list[str]:
    """Return sentences on what `for_gguf` requires, how far it moves the share that is removed, and on rows that the
    blocks of the type do not divide.

    Args:
        subject (`Subject`): the model with all its sites.
        config (`PruningConfig`): the settled request.
        kept (mapping of site key to list of `int`): the units that sites keep.
        without (mapping of site key to list of `int`, *optional*): those that they keep without `for_gguf`; `None`
            where the request is impossible then.
    """
    rules, clauses = _rules_of(subject), []
    if config.cuts_alike:
        clauses.append(f"all layers are alike (llama.cpp's {rules.uniform} has layers of one size)")
    if rules.all_heads:
        clauses.append("all heads are kept")
    multiple = channel_multiple(subject.sites, config)
    if multiple > 1 and UnitKind.MLP in config.width_kinds:
        clauses.append(f"MLP widths are multiples of {multiple}")
    share, other = _share_removed(subject, config, kept), _share_removed(subject, config, without or kept)
    shown, without_it = f"{share:.1%}", f"{other:.1%}"
    compared = "as without it" if shown == without_it else f"compared with {without_it} without it"
    required = ", ".join(clauses) or "nothing changes"
    line = f"for_gguf={config.for_gguf!r}: {required}; it removes {shown} of the prunable parameters, {compared}."
    return [line, *_rows_without_blocks(subject, config, kept)]


def _share_removed(subject: Subject, config: PruningConfig, kept: Mapping[SiteKey, list[int]]) -> float:
    sites = counted_sites(subject.sites, config)
    removed = sum((site.num_units - len(kept[site.key])) * site.unit_parameters for site in sites)
    return removed / sum(site.num_parameters for site in sites)


def _rows_without_blocks(subject: Subject, config: PruningConfig, kept: Mapping[SiteKey, list[int]]) -> Iterator[str]:
    """Yield a sentence on the rows of the pruned model that the blocks of the type do not divide."""
    kind = GGUF_TYPES[str(config.for_gguf)]
    rows: dict[str, set[int]] = {"hidden size": {subject.text_config.hidden_size}}
    for site in subject.sites:
        rows.setdefault(ROWS[site.kind], set()).add(_row_length(site, len(kept[site.key])))
    odd = {name: sorted(length for length in lengths if length % kind.block) for name, lengths in rows.items()}
    named = [f"{', '.join(map(str, lengths))} ({name})" for name, lengths in odd.items() if lengths]
    if named:
        writer = "llama-quantize" if kind.quantize else "the export"
        yield (
            f"Rows of {' and '.join(named)} values are no multiples of {kind.block}, the block of {config.for_gguf}: "
            f"{writer} writes these matrices in {kind.instead} instead."
        )


def _row_length(site: Site, units: int) -> int:
    """Return the length of the rows of the output projection of a site with so many units, or of each expert."""
    return units * site.unit_width if site.routing is None else site.routing.output_weight(0).shape[1]


def _rules_of(subject: Subject) -> GGUFRules:
    config = _stock_config(subject)
    rules = gguf_rules(config)
    if not subject.model.can_generate():
        raise ValueError(f"GGUF files hold causal language models; this is a {type(subject.model).__name__}.")
    rules.check(config)
    return rules


def _stock_config(subject: Subject) -> Any:
    config = subject.model.config
    return stock_config(config) if is_pruned(config) else config
