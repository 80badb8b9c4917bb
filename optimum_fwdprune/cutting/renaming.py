"""The names of parameters and modules after whole layers, sublayers and norms of single heads are removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..architectures import SiteKey, layers_left
from ..architectures.depth import sublayers_left
from ..loading.subject import Subject
from ..models.layout import SUBLAYERS


class Renaming:
    """The names of parameters, buffers and modules before and after a plan is carried out.

    Args:
        subject (`Subject`): the dense model.
        kept (mapping of site key to sequence of `int`): the units that its sites keep.
    """

    def __init__(self, subject: Subject, kept: Mapping[SiteKey, Sequence[int]]):
        layout, config = subject.architecture.layout, subject.text_config
        names = [name for name, _ in subject.architecture.layers(subject.model)]
        self._layers = f"{names[0].rpartition('.')[0]}."
        self._left, sublayers = layers_left(kept), sublayers_left(kept)
        # The removed modules of every layer.
        self._gone: dict[int, tuple[str, ...]] = {}
        for layer in self._left:
            empty = [kind for kind in SUBLAYERS if (layer, kind) not in sublayers]
            self._gone[layer] = tuple(f"{module}." for kind in empty for module in layout.modules_of(kind, config))
        # The heads that lists with a norm for every head keep.
        self._norms = {
            f"{norm.name}.": norm.kept_heads(kept[site.key])
            for site in subject.sites
            for norm in site.norms
            if isinstance(norm.module, nn.ModuleList)
        }

    def after(self, name: str) -> str | None:
        """Return the name in the pruned model of a parameter, buffer or module of the dense model; `None` where it was
        removed."""
        if not name.startswith(self._layers):
            return name
        number, _, rest = name.removeprefix(self._layers).partition(".")
        if int(number) not in self._gone or f"{rest}.".startswith(self._gone[int(number)]):
            return None
        for path, heads in self._norms.items():
            if name.startswith(path):
                head, _, own_name = name.removeprefix(path).partition(".")
                if int(head) not in heads:
                    return None
                rest = f"{rest.removesuffix(f'{head}.{own_name}')}{heads.index(int(head))}.{own_name}"
        return self._joined(self._left.index(int(number)), rest)

    def before(self, name: str) -> str:
        """Return the name in the dense model of a parameter of the pruned model, which the dense model may lack."""
        if not name.startswith(self._layers):
            return name
        number, _, rest = name.removeprefix(self._layers).partition(".")
        dense = self._joined(self._left[int(number)], rest)
        for path, heads in self._norms.items():
            if dense.startswith(path):
                head, _, own_name = dense.removeprefix(path).partition(".")
                return f"{path}{heads[int(head)]}.{own_name}"
        return dense

    def _joined(self, number: int, rest: str) -> str:
        return f"{self._layers}{number}{'.' if rest else ''}{rest}"
