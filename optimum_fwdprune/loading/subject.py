"""The subject of a pruning: a model with its sites, which algorithms work on, and its placement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..architectures import Architecture, Site, SiteKey, find_sites, get_architecture
from ..architectures.sizes import ModelSizes


# Upper limit of the bytes of a tensor in a safetensors header, so that a target in bytes holds for the file.
HEADER_BYTES_PER_TENSOR = 192


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that is measured or pruned.

    Args:
        model (`PreTrainedModel`): the model.
        sites (`list[Site]`): all or some of its sites, in the order in which they write to the residual stream.
        streamed (`bool`, defaults to `False`): whether its decoder layers and those of the pruned model stay on disk,
            with one layer in memory at a time. Other models are cut where their weights are: in memory, on several
            devices, or offloaded by accelerate.
        work_folder (`str` or `Path`, *optional*): folder for temporary files of a streamed model; by default the
            system's.
    """

    model: PreTrainedModel
    sites: list[Site]
    streamed: bool = False
    work_folder: str | Path | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, attention_unit: str = "query_head") -> Subject:
        """Return a model in memory with all its sites."""
        return cls(model, find_sites(model, attention_unit))

    def looking_at(self, sites: Iterable[Site]) -> Subject:
        """Return the same model with some of its sites."""
        return replace(self, sites=list(sites))

    @property
    def architecture(self) -> Architecture:
        """The family of the model."""
        return get_architecture(self.model.config)

    @property
    def text_config(self) -> PreTrainedConfig:
        """The config of the decoder layers: that of the model, or of its language model where it is multimodal."""
        return self.model.config.get_text_config()

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, first to last."""
        return [layer for _, layer in self.architecture.layers(self.model)]

    @property
    def has_dense_target(self) -> bool:
        """Whether the values of the dense model can be the targets of projections."""
        return self.architecture.layout.has_dense_target(self.text_config)

    def losing(self, kept: Mapping[SiteKey, list[int]]) -> list[Site]:
        """Return the sites that keep fewer units than they have, and at least one."""
        return [site for site in self.sites if 0 < len(kept[site.key]) < site.num_units]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, determined before surgery, which consumes the dense model.

    Args:
        parameters (`int`): parameters of the whole model.
        bytes (`int`): size of its weights.
        file_bytes (`int`): upper limit of the size of its weights in a safetensors file.
        prunable (`int`): parameters that units of its sites own.
        per_unit (`dict[SiteKey, int]`): parameters of one unit of every site.
    """

    parameters: int
    bytes: int
    file_bytes: int
    prunable: int
    per_unit: dict[SiteKey, int]

    @classmethod
    def of(cls, model: PreTrainedModel, sites: Sequence[Site]) -> Sizes:
        """Return the sizes of a model and of its sites."""
        sizes = ModelSizes.of(model)
        return cls(
            parameters=sizes.parameters,
            bytes=sizes.bytes,
            file_bytes=sizes.bytes + HEADER_BYTES_PER_TENSOR * sizes.tensors,
            prunable=sum(site.num_parameters for site in sites),
            per_unit={site.key: site.unit_parameters for site in sites},
        )
