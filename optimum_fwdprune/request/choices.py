"""The values that options of a request may have, for the code that decides by them.

A request and its files hold plain strings; the members here equal them, and print as they do.
"""

from enum import StrEnum


class Choice(StrEnum):
    """A value of an option, which messages quote like the string that it equals."""

    def __repr__(self) -> str:
        return repr(self.value)


class UnitKind(Choice):
    """Of `kinds`: what units are part of."""

    ATTENTION = "attention"
    MLP = "mlp"


class AttentionUnit(Choice):
    """Of `attention_unit`: what one unit is under grouped-query attention."""

    KV_GROUP = "kv_group"
    QUERY_HEAD = "query_head"


class Scope(Choice):
    """Of `scope`: whether every layer loses the same share, layers compete for one budget by their scores, or the loss
    of whole pruned models decides what each site loses."""

    LAYER = "layer"
    GLOBAL = "global"
    SEARCH = "search"


class BudgetSharing(Choice):
    """Of `budget`: whether attention and MLP each lose their share, or compete for one budget."""

    SEPARATE = "separate"
    JOINT = "joint"


class Layout(Choice):
    """Of `layout`: whether layers may differ, or must stay what unmodified transformers loads."""

    ANY = "any"
    STOCK = "stock"


class ReconstructionKind(Choice):
    """Of `reconstruction`: what the kept weights take over from the removed ones."""

    NONE = "none"
    BIAS = "bias"
    LEAST_SQUARES = "least_squares"


class ReconstructionOrder(Choice):
    """Of `reconstruction_order`: whether least squares reads activations of the dense model, or of what is pruned."""

    INDEPENDENT = "independent"
    SEQUENTIAL = "sequential"


class ReconstructionTarget(Choice):
    """Of `reconstruction_target`: what sequential least squares fits, the dense residual stream or the layer's own
    output."""

    DENSE = "dense"
    LAYER = "layer"
