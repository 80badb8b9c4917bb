"""Quantized checkpoints: dequantized while they are loaded where transformers can do this, and refused otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.quantizers import AutoQuantizationConfig

from ..runs.loggers import get_logger


logger = get_logger(__name__)


def dequantizing(model_id: Any, config: PreTrainedConfig, quantization_config: Any = None) -> Any:
    """Return the `quantization_config` with which a checkpoint is loaded without quantized weights; `None` where it
    needs none.

    Transformers can dequantize some formats while it loads them, for example MXFP4 (gpt-oss) and FP8 in blocks
    (DeepSeek-V3). A warning says that it does.

    Args:
        model_id (`str` or `Path`): folder or repository of the checkpoint.
        config (`PreTrainedConfig`): its config.
        quantization_config (*optional*): the argument of `from_pretrained` of this name.

    Raises:
        ValueError: where the weights would be loaded quantized; the message names the ways out.
    """
    stored = getattr(config, "quantization_config", None)
    asked = quantization_config or stored
    if asked is None or _values(asked).get("dequantize"):
        return asked
    method = _values(asked).get("quant_method", type(asked).__name__)
    method = getattr(method, "value", method)
    # A config that was passed asks for quantized weights.
    known: Any = _known(stored) if quantization_config is None else None
    if not hasattr(known, "dequantize"):
        raise ValueError(
            f"{model_id} would be loaded quantized ({method}), and quantized weights cannot be cut. Load the "
            f"unquantized model, or one in memory whose dequantize() was called: FwdPruner(model, tokenizer). The "
            f"pruned model can be quantized."
        )
    known.dequantize = True
    logger.warning(
        "%s is quantized (%s). Its weights are dequantized while they are loaded, and take more memory. The pruned "
        "model can be quantized again.",
        model_id,
        method,
    )
    return known


def _known(stored: Any) -> Any:
    """Return the config of a stored quantization as transformers reads it; `None` for methods unknown to it."""
    if not isinstance(stored, Mapping):
        return stored
    try:
        return AutoQuantizationConfig.from_dict(dict(stored))
    except (ImportError, ValueError):
        return None


def _values(quantization: Any) -> Mapping[str, Any]:
    return quantization if isinstance(quantization, Mapping) else vars(quantization)
