"""Checkpoints of an earlier run: which one to resume from, and whether it fits the model that is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME

from ..loading.integrity import shapes_of, weight_files
from .adapters import WEIGHTS_NAME, check_adapters
from .arguments import RecoveryArguments, last_checkpoint
from .options import BLOCK_DISTILL


# The folder in `output_dir` of blocks that are trained.
BLOCKS_FOLDER = "blocks"


def checkpoint_of(args: RecoveryArguments) -> str | None:
    """Return the checkpoint to resume from; `None` where the arguments ask for none.

    Raises:
        ValueError: where there is no such checkpoint, or its record of the run is damaged.
    """
    if not asks_to_resume(args):
        return None
    asked: Any = args.resume_from_checkpoint
    if str(asked).lower() == "true":
        checkpoint = last_checkpoint(str(args.output_dir))
        if checkpoint is None:
            raise ValueError(f"There is no checkpoint to resume from in {args.output_dir}.")
    else:
        checkpoint = str(asked)
    if not Path(checkpoint).is_dir():
        raise ValueError(f"There is no checkpoint {checkpoint} to resume from.")
    _check_state(Path(checkpoint) / TRAINER_STATE_NAME)
    return checkpoint


def asks_to_resume(args: RecoveryArguments) -> bool:
    """Return whether the arguments ask to resume an earlier run."""
    asked: Any = args.resume_from_checkpoint
    return asked is not None and str(asked).lower() != "false"


def steps_of(checkpoint: str) -> int:
    """Return the number of steps that a checkpoint was trained for."""
    return json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]


def state_to_resume(args: RecoveryArguments) -> str | None:
    """Return the value of `resume_from_checkpoint` with which a run resumes from `output_dir`; `None` where nothing is
    stored in it."""
    folder = Path(str(args.output_dir))
    if args.mode == BLOCK_DISTILL:
        return "true" if any((folder / BLOCKS_FOLDER).glob("*.safetensors")) else None
    return last_checkpoint(folder)


def check_resumable(folder: str, model: Any, args: RecoveryArguments) -> None:
    """Raise `ValueError` where a checkpoint is from a run of another mode, or of a model with other shapes.

    Args:
        folder (`str`): folder of the checkpoint.
        model (`PreTrainedModel` or `PeftModel`): model to train, with new adapters if these are trained.
        args (`RecoveryArguments`): arguments of the training.
    """
    if args.trains_adapters:
        check_adapters(folder, model)
    elif (Path(folder) / WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{folder} holds adapters, and this run trains all weights. Resume with mode='lora' or 'distill', or name "
            f"a checkpoint of all weights."
        )
    elif not (args.fsdp or args.deepspeed):  # They store weights in files of another format.
        _check_weights(folder, model)


def _check_state(file: Path) -> None:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file.parent} is no checkpoint of a run: there is no {file.name} in it.") from error
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}. Resume from another checkpoint.") from error
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        raise ValueError(f"{file} is not the record of a run: it has no global_step. Resume from another checkpoint.")


def _check_weights(folder: str, model: PreTrainedModel) -> None:
    files = weight_files(folder, {})
    if not files:
        raise ValueError(f"{folder} holds no weights: there is no safetensors file of a model in it.")
    try:
        stored = shapes_of(files)
    except OSError as error:
        raise ValueError(f"{folder} cannot be resumed from: {error}") from error
    tied = getattr(model, "all_tied_weights_keys", {})
    own = {name: tuple(value.shape) for name, value in model.named_parameters() if name not in tied}
    for name, shape in own.items():
        if stored.get(name) != shape:
            raise ValueError(
                f"The checkpoint {folder} belongs to another model: {name} has the shape {stored.get(name)} there and "
                f"{shape} here. Resume the training of the model that it was made from, or start a new training."
            )
