"""The trained weights of blocks on disk, from which an interrupted run resumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import SaveStrategy

from ...loading.offloading import resident
from ...runs.resume import Resume, Stage, digest_of
from ..arguments import RecoveryArguments
from ..resuming import BLOCKS_FOLDER, asks_to_resume
from .blocks import Block
from .training import Fitted


# Arguments on which the trained weights depend.
DECIDING = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "gradient_accumulation_steps",
    "layers_per_block",
    "learning_rate",
    "max_grad_norm",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "seed",
    "tokens",
    "warmup_steps",
    "weight_decay",
)


def resumed_folder(args: RecoveryArguments) -> Path | None:
    """Return the folder to resume from; `None` where the arguments ask for none.

    Raises:
        ValueError: where there is no such folder, or it holds no blocks.
    """
    if not asks_to_resume(args):
        return None
    asked: Any = args.resume_from_checkpoint
    folder = Path(str(args.output_dir)) / BLOCKS_FOLDER if str(asked).lower() == "true" else Path(str(asked))
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"There are no trained blocks to resume from in {folder}. Name the folder {BLOCKS_FOLDER!r} in the "
            f"output_dir of an interrupted run of mode='block_distill'."
        )
    return folder


class BlockStates:
    """The states of all blocks of a run.

    Args:
        args (`RecoveryArguments`): `output_dir`, `save_strategy`, `resume_from_checkpoint`, and the arguments on which
            the weights depend.
        identity (`dict`): the other inputs on which the weights depend, as JSON values.
        layers (sequence of `nn.Module`): the decoder layers of the pruned model.
        blocks (sequence of `Block`): the blocks.

    Raises:
        ValueError: where the run to resume has other inputs, or began with other weights.
    """

    def __init__(
        self,
        args: RecoveryArguments,
        identity: dict[str, Any],
        layers: Sequence[nn.Module],
        blocks: Sequence[Block],
    ):
        resumed = resumed_folder(args)
        is_saved = args.save_strategy != SaveStrategy.NO
        folder = resumed or (Path(str(args.output_dir)) / BLOCKS_FOLDER if is_saved else None)
        if folder is not None and resumed is None:
            # Those of an earlier run; other files in a folder of this name are the user's.
            for file in (*folder.glob("block-*.safetensors"), folder / "model.safetensors"):
                file.unlink(missing_ok=True)
        decided = {name: getattr(args, name) for name in DECIDING}
        decided |= {"optim": str(args.optim), "lr_scheduler_type": str(args.lr_scheduler_type)}
        self._resume = Resume(folder, {"arguments": decided, **identity})
        self._names = list(map(str, blocks))
        self._blocks = [nn.ModuleList(layers[number] for number in block.layers) for block in blocks]
        self._done: list[Fitted] = []
        if folder is not None:
            self._begin()

    @property
    def done(self) -> int:
        """The number of blocks that are trained already."""
        return len(self._done)

    def take(self, number: int) -> Fitted:
        """Give block `number`, whose weights are in memory, its trained weights, and return the result of training."""
        tensors, _ = self._load(number)
        for name, parameter in self._blocks[number].named_parameters():
            parameter.data = tensors[name].to(parameter.device)
        return self._done[number]

    def save(self, number: int, fitted: Fitted) -> None:
        """Store the weights of a trained block, which are in memory."""
        weights = {name: parameter.detach() for name, parameter in self._blocks[number].named_parameters()}
        self._stage(number).save(lambda: (weights, {"fitted": asdict(fitted)}))

    def _begin(self) -> None:
        """Read the blocks that are done, and check that the model is that of the run."""
        own = []
        for block in self._blocks:
            with resident(block):
                own.append(_digest(dict(block.named_parameters())))
        model = self._resume.stage("model")
        known = model.load(lambda _tensors, numbers: numbers["digests"])
        if known is None:
            model.save(lambda: ({}, {"digests": own}))
            return
        trained = []
        for number in range(len(self._blocks)):
            tensors, fitted = self._load(number)
            if fitted is None:
                break
            self._done.append(fitted)
            trained.append(_digest(tensors))
        for number, digest in enumerate(own):
            # The weights of a block that is done may be those before the run, or those that it trained.
            if digest not in (known[number], *trained[number : number + 1]):
                raise ValueError(
                    f"The run to resume is one of another model: the weights of {self._names[number]} differ. Load "
                    f"the model that it began with, or start a new run without resume_from_checkpoint."
                )

    def _load(self, number: int) -> tuple[dict[str, torch.Tensor], Fitted | None]:
        """Return the weights of a block and the result of its training; `None` where it is not done."""
        state = self._stage(number).load(lambda tensors, numbers: (tensors, Fitted(**numbers["fitted"])))
        return ({}, None) if state is None else state

    def _stage(self, number: int) -> Stage:
        return self._resume.stage(f"block-{number:05d}")


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    return digest_of(sorted(tensors.items(), key=itemgetter(0)))
