"""A job: a settled request with its budget, the folder of its states, and the clock of its stages."""

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


# Fields of a request that do not change its result, up to rounding.
IMMATERIAL = ("batch_size",)


@dataclass(frozen=True)
class Job:
    """One round of a request for one model.

    Args:
        config (`PruningConfig`): the settled request.
        budget (`Budget`, *optional*): how much it removes; `None` where a plan determines the kept units.
        resume (`Resume`): the folder where long stages store their state; by default none.
        clock (`StageClock`): the seconds of every stage so far, over all rounds.
    """

    config: PruningConfig
    budget: Budget | None = None
    resume: Resume = field(default_factory=Resume)
    clock: StageClock = field(default_factory=StageClock)


def resume_of(config: PruningConfig, model: PreTrainedModel) -> Resume:
    """Return where the stages of a request for a model store their states: the folder `config.resume`.

    Raises:
        OSError: where this is a file or a folder that cannot be written to.
    """
    if config.resume is None:
        return Resume()
    request = {name: value for name, value in config.to_dict().items() if name not in IMMATERIAL}
    # The path of the model is no part of it, since it differs between machines.
    weights = digest_of((name, read_parameter(model, name)) for name, _ in model.named_parameters())
    identity = {"model": type(model).__name__, "weights": weights, "request": request}
    return Resume(Path(config.resume), identity, config.resume_seconds)


def resume_held(config: PruningConfig) -> AbstractContextManager[None]:
    """Lock the folder `config.resume`, if there is one, so that no other run stores its states there.

    Raises:
        BlockingIOError: where another run holds the lock.
        OSError: where it is a file or a folder that cannot be written to.
    """
    return nullcontext() if config.resume is None else held(config.resume, "another folder with resume=...")
