"""Storage for the dense model's hidden states, where several reconstructions use them."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from ..data.calibration import Calibration
from ..request.choices import ReconstructionKind, ReconstructionOrder, ReconstructionTarget
from ..request.config import PruningConfig
from ..runs.resume import Resume
from ..runs.shelves import Shelf


# Hidden states of the dense model that take more bytes are stored in files.
BYTES_IN_MEMORY = 2 * 2**30


def shared_dense_stream(
    model: PreTrainedModel, requests: Sequence[PruningConfig], calibration: Calibration | None, resume: Resume
) -> Shelf | None:
    """Return storage for the hidden states that the reconstructions of requests share; `None` where none needs them,
    or where they take more than `BYTES_IN_MEMORY` and there is no folder for them.

    Args:
        model (`PreTrainedModel`): the dense model.
        requests (sequence of `PruningConfig`): the requests.
        calibration (`Calibration`, *optional*): their calibration tokens.
        resume (`Resume`): the folder for states, and the identity of the model.
    """
    fitted = [request for request in requests if _follows_the_dense_model(request)]
    if calibration is None or not fitted:
        return None
    text_config = model.config.get_text_config()
    # Per layer: the stream after attention and after the MLP, and the inputs of the sources of both.
    per_layer = 4 if any(request.refit_sources for request in fitted) else 2
    values = calibration.input_ids.numel() * text_config.hidden_size * (1 + per_layer * text_config.num_hidden_layers)
    if values * model.dtype.itemsize <= BYTES_IN_MEMORY:
        return Shelf()
    folder = resume.folder("dense-stream", calibration, batch_size=fitted[0].batch_size, per_layer=per_layer)
    return None if folder is None else Shelf(folder)


def _follows_the_dense_model(request: PruningConfig) -> bool:
    """Return whether the reconstruction of a request fits the hidden states of the dense model."""
    return (
        request.reconstruction == ReconstructionKind.LEAST_SQUARES
        and request.reconstruction_order != ReconstructionOrder.INDEPENDENT
        and request.reconstruction_target != ReconstructionTarget.LAYER
    )
