"""A job: a settled request with its budget, where its states are kept, and the clock of its stages."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from ..loading.offloading import read_parameter
from ..request.config import PruningConfig
from ..runs.clock import StageClock
from ..runs.locks import held
from ..runs.resume import Resume, digest_of
from .budgets import Budget


# Fields of a request that do not change what comes of it, up to rounding.
IMMATERIAL = ("batch_size",)


@dataclass(frozen=True)
class Job:
    """One round of a request for one model.

    Args:
        config (`PruningConfig`): the settled request.
        budget (`Budget`, *optional*): what it removes; `None` where a plan says what stays.
        resume (`Resume`): where long stages keep their state; by default nowhere.
        clock (`StageClock`): the seconds of every stage so far, of all rounds.
    """

    config: PruningConfig
    budget: Budget | None = None
    resume: Resume = field(default_factory=Resume)
    clock: StageClock = field(default_factory=StageClock)


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


def resume_held(config: PruningConfig) -> AbstractContextManager[None]:
    """Hold the folder `config.resume`, where there is one, so that no other run keeps its states there.

    Raises:
        BlockingIOError: where another run holds it.
        OSError: where it is a file, or nothing can be written there.
    """
    return nullcontext() if config.resume is None else held(config.resume, "another folder with resume=...")
