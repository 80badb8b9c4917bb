"""What pruned classes of multimodal families share: the language model is pruned, and all other parts stay whole."""

from dataclasses import replace
from typing import ClassVar

from transformers import PreTrainedConfig

from .layout import DecoderLayout


class MultimodalConfigMixin:
    """First base of the pruned config of a multimodal family, in front of the stock config.

    Its `text_config` is the pruned config of the language model, which has the sizes of every layer. A family sets:

    - `text_config_classes`: the pruned configs that `text_config` may be, the usual one first.
    """

    text_config_classes: ClassVar[tuple[type[PreTrainedConfig], ...]]

    def __post_init__(self, **kwargs):
        if not isinstance(self.text_config, PreTrainedConfig):
            values = self.text_config or {}
            # Remote code registers no classes that transformers could look up.
            known = {text_class.model_type: text_class for text_class in self.text_config_classes}
            self.text_config = known.get(values.get("model_type"), self.text_config_classes[0])(**values)
        super().__post_init__(**kwargs)


def in_language_model(layout: DecoderLayout) -> DecoderLayout:
    """Return the layout of a language model as that of the multimodal model around it."""
    return replace(layout, layers=f"language_model.{layout.layers}")
