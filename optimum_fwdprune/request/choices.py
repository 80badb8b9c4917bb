"""The values that options of a request may have, as enums for the code that branches on them.

A request and its files hold plain strings. The members of these enums are equal to them, and print like them.
"""

from enum import StrEnum


class Choice(StrEnum):
    """A value of an option; its representation in messages is that of the string that it is equal to."""

    def __repr__(self) -> str:
        return repr(self.value)


class UnitKind(Choice):
    """Values of `kinds`: the part of a layer that units belong to."""

    ATTENTION = "attention"
    MLP = "mlp"
    EXPERT = "expert"


# The kinds of units whose removal makes sites narrower: heads and channels.
WIDTH_KINDS = (UnitKind.ATTENTION, UnitKind.MLP)


class DepthKind(Choice):
    """Values of `kinds` in addition to those of [`UnitKind`]: layers and sublayers, which are removed as a whole."""

    LAYER = "layer"
    SUBLAYER = "sublayer"


class AttentionUnit(Choice):
    """Values of `attention_unit`: what one unit is under grouped-query attention."""

    KV_GROUP = "kv_group"
    QUERY_HEAD = "query_head"


class Scope(Choice):
    """Values of `scope`: every layer loses the same share, layers compete for one budget by their scores, or the loss
    of whole pruned models decides what each site loses."""

    LAYER = "layer"
    GLOBAL = "global"
    SEARCH = "search"


class Phase(Choice):
    """Parts of a generation: the pass over the prompt, and the passes over one new token each."""

    PREFILL = "prefill"
    DECODE = "decode"


class BudgetSharing(Choice):
    """Values of `budget`: attention and MLP have a budget each, or compete for one budget."""

    SEPARATE = "separate"
    JOINT = "joint"


class Layout(Choice):
    """Values of `layout`: layers may differ in size, must have the same size, or must have sizes that unmodified
    transformers can load."""

    ANY = "any"
    ALIKE = "alike"
    STOCK = "stock"


class ReconstructionKind(Choice):
    """Values of `reconstruction`: how the kept weights make up for the removed ones."""

    NONE = "none"
    BIAS = "bias"
    LEAST_SQUARES = "least_squares"


class ReconstructionOrder(Choice):
    """Values of `reconstruction_order`: least squares uses activations of the dense model, or of the pruned layers."""

    INDEPENDENT = "independent"
    SEQUENTIAL = "sequential"


class ReconstructionTarget(Choice):
    """Values of `reconstruction_target`: sequential least squares fits the dense model's residual stream, or the
    layer's own output."""

    DENSE = "dense"
    LAYER = "layer"
