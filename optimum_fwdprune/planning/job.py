"""What one run of a request is beside the request: where its states are kept."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from ..loading.offloading import read_parameter
from ..request.config import PruningConfig
from ..runs.resume import Resume, digest_of


# Fields of a request that do not change what is found, up to rounding.
IMMATERIAL = ("batch_size",)


def resume_of(config: PruningConfig, model: PreTrainedModel) -> Resume:
    """Return where the stages of a request for a model keep their states: in `config.resume`.

    Raises:
        OSError: where that is a file, or nothing can be written there.
    """
    if config.resume is None:
        return Resume()
    request = {name: value for name, value in config.to_dict().items() if name not in IMMATERIAL}
    # Not where the model lies, which another machine calls otherwise.
    weights = digest_of((name, read_parameter(model, name)) for name, _ in model.named_parameters())
    identity = {"model": type(model).__name__, "weights": weights, "request": request}
    return Resume(Path(config.resume), identity, config.resume_seconds)
