"""Distillation by blocks: decoder layers of a pruned model are trained one after the other, each on its own.

Every block reads the hidden states of the pruned model, and is trained towards those that the dense model has after
the same layer. Only one block, its optimizer and a layer of the dense model need to be in the memory of the device.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from ...allocation.plan import PruningPlan
from ...cutting.layered import LayeredCheckpoint, Workspace
from ...files import naming_what_is_full
from ...forward.layerwise import decoder_layers
from ...loading.offloading import is_offloaded, resident
from ...loading.saving import check_savable
from ...loading.source import Source
from ...runs import ranks
from ...runs.locks import held
from ...runs.loggers import get_logger
from ...runs.products import products_in_float32
from ...runs.progress import progress
from ...runs.randomness import random_states_kept
from ...runs.resume import digest_of
from ..amounts import wanted_by
from ..arguments import RecoveryArguments
from ..data import TrainingTexts, limits_of, training_data
from ..finetuning import check_weights
from ..restoring import ModelState, left_as_it_was, removed_where_unused
from ..self_written import check_self_written
from ..teachers import TeacherSource, find_teacher
from ..trainer import frozen_share
from .blocks import Block, blocks_of
from .states import BlockStates, resumed_folder
from .streams import Sequences, remove_files, streams_of
from .training import BlockTrainer, Fitted


logger = get_logger(__name__)

# The folder in `output_dir` of hidden states that are too large for the memory.
HIDDEN_STATES = "hidden_states"

# The share of the sequences that is held out by default.
HELD_OUT = 1 / 16


class BlockDistillation:
    """Trains a pruned model block by block.

    Args:
        model (`PreTrainedModel`): the pruned model, in memory, or opened with `low_memory`.
        plan (`PruningPlan`, *optional*): the plan of its pruning, which lists the layers that were removed.
        source (`Source`): how it was opened.

    Attributes:
        model (`PreTrainedModel`): the model, trained in place; of a model with layers on disk, a new one that reads
            new files, once training has ended.
        fitted (`list` of `tuple[Block, Fitted]`): the blocks that are trained, with the errors before and after.
        is_resumed_whole (`bool`): whether an earlier run had trained all blocks.
    """

    def __init__(self, model: PreTrainedModel, plan: PruningPlan | None, source: Source):
        self.model = model
        self.fitted: list[tuple[Block, Fitted]] = []
        self.is_resumed_whole = False
        self._plan, self._source = plan, source
        self._summary: dict[str, Any] = {}

    @property
    def has_changed_weights(self) -> bool:
        """Whether weights of `model` differ from those before, also where training failed."""
        return any(fitted.is_kept for _, fitted in self.fitted) and not is_offloaded(self.model)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def run(self, texts: TrainingTexts, args: RecoveryArguments, teacher: Any) -> None:
        """Train all blocks, first to last.

        Args:
            texts (`TrainingTexts`): training data, with the tokenizer that is saved with the model.
            args (`RecoveryArguments`): arguments of the training.
            teacher (`PreTrainedModel`, `PeftModel`, `str`, `Path` or `Origin`, *optional*): the dense model, or a name
                or place to load it from. `args.teacher` replaces an `Origin`.

        Raises:
            ValueError: before training starts, where the data, the teacher or the run to resume from does not fit the
                model, or the arguments ask for what only the Trainer does.
        """
        model = self.model
        check_blocks(model, texts, args)
        resumed_folder(args)
        source = find_teacher(model, args, teacher, self._source.access)
        assert source is not None
        before, folder = ModelState(model), Path(str(args.output_dir))
        with (
            random_states_kept(),
            left_as_it_was(source.model),
            removed_where_unused(folder),
            held(folder, "another one as output_dir"),
            naming_what_is_full(folder),
            products_in_float32(),
        ):
            try:
                trained = self._train(texts, args, source)
            finally:
                before.put_back()
                remove_files(folder / HIDDEN_STATES)
        for parameter, own in zip(trained.parameters(), model.parameters(), strict=True):
            parameter.requires_grad_(own.requires_grad)
        self.model = trained.eval()

    def _train(self, texts: TrainingTexts, args: RecoveryArguments, source: TeacherSource) -> PreTrainedModel:
        student = self.model.eval()
        if not is_offloaded(student) and len(set((getattr(student, "hf_device_map", None) or {}).values())) < 2:
            student.to(args.device)  # type: ignore[arg-type]
        # Layers of a teacher that is loaded by its name are read from disk when they are needed.
        teacher = source.load(student, args, args.device, on_disk=True).eval()
        blocks = blocks_of(student, teacher, self._plan, args.layers_per_block)
        if texts.is_self_written:
            # A teacher on disk would be read as a whole for every token that it writes.
            texts = texts.written_by(source.load(student, args, args.device), source.identity, args)
        sequences = _sequences(texts, student, args)
        identity = {
            "teacher": source.identity,
            "tokens": digest_of((str(number), ids) for number, ids in enumerate(sequences.ids)),
            "held_out": sequences.held_out[:1],
        }
        layers = decoder_layers(student)
        states = BlockStates(args, identity, layers, blocks)
        folder = Path(str(args.output_dir)) / HIDDEN_STATES
        pruned, dense = streams_of(student, teacher, sequences, args.train_batch_size, args.hidden_states_gb, folder)
        trainer = BlockTrainer(args, sequences, pruned, dense)
        # A budget that the data cannot fill is refused here.
        self._summary = _summary_of_run(student, args, sequences, trainer)
        written = None
        if is_offloaded(student):
            written = LayeredCheckpoint(Workspace(self._source.work_folder), student, student)
            written.write_rest()
        self.is_resumed_whole = is_finished = states.done == len(blocks)
        if not is_finished:
            pruned.start()
            dense.start()
        steps = progress(blocks, "Distilling blocks", unit="block")
        for number, block in enumerate(steps):
            if not is_finished:
                dense.advance(block.dense)
            with ExitStack() as in_memory:
                for layer in block.layers:
                    in_memory.enter_context(resident(layers[layer]))
                if number < states.done:
                    fitted = states.take(number)
                else:
                    fitted = trainer.fit(block)
                    states.save(number, fitted)
                self.fitted.append((block, fitted))
                if not is_finished:
                    pruned.advance(block.layers)
                if written is not None:
                    for layer in block.layers:
                        written.write_layer(layer, {}, {}, {})
            steps.set_postfix(error=f"{fitted.before:.4g} -> {fitted.after:.4g}")
        self._warn_of_unchanged()
        if written is None:
            return student
        written.finish()
        return written.load()

    def summary(self) -> dict[str, Any]:
        """Return a summary of the run as JSON values."""
        blocks = [
            {
                "layers": [block.layers[0], block.layers[-1]],
                "held-out error before": round(fitted.before, 6),
                "held-out error after": round(fitted.after, 6) if fitted.is_kept else None,
            }
            for block, fitted in self.fitted
        ]
        return {**self._summary, "blocks": blocks}

    def _warn_of_unchanged(self) -> None:
        unchanged = [str(block) for block, fitted in self.fitted if not fitted.is_kept and fitted.before]
        if unchanged:
            logger.warning(
                "Training did not reduce the error on held-out sequences at %d of %d blocks, whose weights are not "
                "changed: %s. More data or a smaller learning_rate may help.",
                len(unchanged),
                len(self.fitted),
                ", ".join(unchanged),
            )


def check_blocks(model: PreTrainedModel, texts: TrainingTexts, args: RecoveryArguments) -> None:
    """Raise `ValueError` where a training by blocks cannot follow its arguments, or could change or save no weight.

    Args:
        model (`PreTrainedModel`): the model that is trained.
        texts (`TrainingTexts`): training data.
        args (`RecoveryArguments`): arguments of the training.
    """
    check_savable(model, texts.tokenizer)
    check_weights(model, args)
    _check_arguments(args)
    check_self_written(texts.is_self_written, args)


def _check_arguments(args: RecoveryArguments) -> None:
    if ranks.world_size() > 1:
        raise ValueError(
            f"mode='block_distill' runs in one process, and this is one of {ranks.world_size()}. Start it without a "
            f"launcher; mode='distill' takes several."
        )
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name):
            raise ValueError(
                f"{name} cannot be combined with mode='block_distill', which trains a few layers at a time."
            )
    Trainer.get_optimizer_cls_and_kwargs(args)


def _sequences(texts: TrainingTexts, student: PreTrainedModel, args: RecoveryArguments) -> Sequences:
    limits = limits_of(student)
    held_out, share = None, held_out_share(args, texts)
    if share is None:
        held_out = training_data(texts.eval_dataset, texts.tokenizer, args, **limits)
    data = training_data(texts.dataset, texts.tokenizer, args, wanted_by(args, share), **limits)
    return Sequences.of(data, held_out, share)


def held_out_share(args: RecoveryArguments, texts: TrainingTexts) -> float | None:
    """Return the share of the training data that is held out; `None` where there is other held-out data."""
    if texts.eval_dataset is not None:
        return None
    return HELD_OUT if args.held_out is None else args.held_out


def _summary_of_run(
    student: PreTrainedModel, args: RecoveryArguments, sequences: Sequences, trainer: BlockTrainer
) -> dict[str, Any]:
    lengths = sequences.lengths
    return {
        "mode": args.mode,
        "adapters": False,
        **frozen_share(student, trains_adapters=False),
        "steps": trainer.steps,
        "sequences per step": trainer.sequences_per_step,
        "learning rate": args.learning_rate,
        "trained parameters": sum(
            parameter.numel()
            for layer in decoder_layers(student)
            for parameter in layer.parameters()
            if parameter.requires_grad
        ),
        "sequences": len(sequences.training),
        "tokens": sum(lengths[row] for row in sequences.training),
        "held-out tokens": sum(lengths[row] for row in sequences.held_out),
    }
