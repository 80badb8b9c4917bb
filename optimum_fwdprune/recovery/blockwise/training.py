"""The training of one block: its output is brought near to the dense model's hidden states at the same place."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer, get_scheduler

from ...runs.progress import progress
from ...runs.randomness import seeded_generator
from ..arguments import RecoveryArguments
from ..budgets import steps_for_tokens, tokens_of
from ..precision import float32_while_trained
from .blocks import Block
from .streams import Sequences, Stream


@dataclass(frozen=True)
class Fitted:
    """The result of training a block.

    Args:
        before (`float`): the error on held-out sequences before training, see [`relative_error`].
        after (`float`): the error after training.
        is_kept (`bool`): whether the trained weights are kept, since the error fell.
    """

    before: float
    after: float
    is_kept: bool


class BlockTrainer:
    """Trains blocks on the hidden states before them, towards those of the dense model after them.

    Args:
        args (`RecoveryArguments`): the optimizer, its schedule, the batch sizes, `num_train_epochs` or `max_steps` per
            block, and the seed.
        sequences (`Sequences`): the sequences of the training data.
        pruned (`Stream`): the pruned model, before the current block.
        dense (`Stream`): the dense model, after the current block.
    """

    def __init__(self, args: RecoveryArguments, sequences: Sequences, pruned: Stream, dense: Stream):
        self._args = args
        self._sequences = sequences
        self._pruned, self._dense = pruned, dense

    @property
    def sequences_per_step(self) -> int:
        """The number of sequences per optimizer step."""
        return self._args.train_batch_size * self._args.gradient_accumulation_steps

    @property
    def steps(self) -> int:
        """The number of optimizer steps per block."""
        if self._args.max_steps > 0:
            return self._args.max_steps
        if self._args.tokens is not None:
            available = sum(len(self._sequences.ids[row]) for row in self._sequences.training)
            per_step = self.sequences_per_step * available / len(self._sequences.training)
            return steps_for_tokens(tokens_of(self._args.tokens), available, per_step).steps
        per_epoch = -(-len(self._sequences.training) // self.sequences_per_step)
        return max(1, math.ceil(float(self._args.num_train_epochs or 0) * per_epoch))

    def fit(self, block: Block) -> Fitted:
        """Train a block, and restore its weights where the error on held-out sequences does not fall.

        Args:
            block (`Block`): the block, whose weights are in memory.

        Raises:
            ValueError: where hidden states contain NaN or infinity.
        """
        module = nn.ModuleList(self._pruned.layers[number] for number in block.layers)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        before = self._held_out_error(block)
        if not math.isfinite(before):
            raise ValueError(
                f"The hidden states of {block} contain NaN or infinity in the pruned or in the dense model, so that "
                f"they cannot be compared. Check the weights, and load float16 models in bfloat16."
            )
        if not trained or not before:
            return Fitted(before, before, is_kept=False)
        values = [parameter.detach().clone() for parameter in trained]
        after, is_kept = math.inf, False
        try:
            with float32_while_trained(module):
                self._train(block, trained)
            after = self._held_out_error(block)
            # This is false for NaN.
            is_kept = after < before
        finally:
            if not is_kept:
                for parameter, value in zip(trained, values):
                    parameter.data = value
            for parameter in trained:
                parameter.grad = None
        return Fitted(before, after, is_kept)

    def _train(self, block: Block, trained: list[nn.Parameter]) -> None:
        args = self._args
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        # As in the Trainer, biases and the weights of norms do not decay.
        matrices = [parameter for parameter in trained if parameter.dim() > 1]
        vectors = [parameter for parameter in trained if parameter.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = kind([group for group in groups if group["params"]], **options)
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(self.steps),
            num_training_steps=self.steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )
        batches = self._batches(block)
        for _ in progress(range(self.steps), f"Training {block}", unit="step"):
            rows = next(batches)
            places = sum(len(self._sequences.ids[row]) for row in rows)
            for part in self._sequences.chunks(rows, args.train_batch_size):
                with self._autocast():
                    output = self._pruned.run(block.layers, part, self._pruned.read(part), in_float32=True)
                (self._errors(output, part).sum() / places).backward()
            if args.max_grad_norm:
                nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    def _batches(self, block: Block) -> Iterator[list[int]]:
        """Yield the sequences of every step, in an order that depends on the seed and the block only."""
        generator = seeded_generator(self._args.seed, block.layers[0])
        training = self._sequences.training
        while True:
            order = torch.randperm(len(training), generator=generator).tolist()
            for start in range(0, len(order), self.sequences_per_step):
                yield [training[place] for place in order[start : start + self.sequences_per_step]]

    @torch.no_grad()
    def _held_out_error(self, block: Block) -> float:
        total, places = 0.0, 0
        for rows in self._sequences.chunks(self._sequences.held_out, self._args.train_batch_size):
            errors = self._errors(self._pruned.run(block.layers, rows, self._pruned.read(rows)), rows)
            total, places = total + float(errors.sum(dtype=torch.float32)), places + len(errors)
        return total / places

    def _errors(self, output: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Return the error at every token of some sequences: `[tokens]`."""
        present = self._sequences.present(rows)
        target = self._dense.read(rows)[present].to(output.device)
        return relative_error(output[present.to(output.device)], target)

    def _autocast(self) -> Any:
        if not self._args.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self._args.device.type, dtype=torch.bfloat16)


def relative_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the squared error of hidden states at every token, relative to the square of the target.

    It is relative at every token, so that the few tokens with massive activations (Sun et al., arXiv 2402.17762) have
    no more weight than any other.

    Args:
        output, target (`Tensor[tokens, hidden_size]`): hidden states of the pruned and of the dense model.

    Returns:
        `Tensor[tokens]`, float32: the errors.
    """
    target = target.float()
    squares = target.square().sum(-1)
    # A token without any activation in the dense model would have an infinite weight.
    return (output.float() - target).square().sum(-1) / squares.clamp_min(torch.finfo(squares.dtype).tiny)
