"""A Trainer whose loss can include the divergence from a teacher."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from ..loading.saving import generation_config_as_it_is
from .arguments import RecoveryArguments
from .data import IGNORED, collate
from .distillation import TEACHER_IDS, TEACHER_LOGARITHMS, Teacher, distillation_terms, hidden_error


class RecoveryTrainer(Trainer):
    """A `Trainer` whose loss is a mean of cross-entropy and divergence from a teacher, if there is a teacher.

    Args:
        args (`RecoveryArguments`): `distill_weight`, `hidden_weight` and `temperature`, and the Trainer's arguments.
        teacher (`Teacher`, *optional*): a teacher in memory.
        distills (`bool`, defaults to `False`): whether the loss compares the model with a teacher: with `teacher`, or
            by default with the predictions in the data.
        kwargs: the Trainer's other arguments.
    """

    args: RecoveryArguments

    def __init__(self, *, args: RecoveryArguments, teacher: Teacher | None = None, distills: bool = False, **kwargs):
        loss = self._distillation_loss if distills else None
        super().__init__(args=args, data_collator=collate, compute_loss_func=loss, **kwargs)
        self._teacher = teacher
        # Adapters are merged when the record is written.
        assert self.model is not None
        self._trained_parameters = sum(
            int(parameter.numel()) for parameter in self.model.parameters() if parameter.requires_grad
        )
        self._distills = distills
        # The teacher's predictions of the current batch.
        self._predicted: tuple[Any, ...] = ()
        self._parts: dict[str, float] = {}
        self._batches = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._distills:
            ids, logits = inputs.pop(TEACHER_IDS, None), inputs.pop(TEACHER_LOGARITHMS, None)
            hidden = None
            if logits is None and self._teacher is not None:
                logits, hidden = self._teacher(
                    inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
                )
            self._predicted = (logits, ids, hidden, inputs.get("attention_mask"))
            inputs = {**inputs, "output_hidden_states": hidden is not None}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self._batches and "loss" in logs:
            logs |= {name: value / self._batches for name, value in self._parts.items()}
            self._parts, self._batches = {}, 0
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with generation_config_as_it_is(self.model, output_dir or str(self.args.output_dir)):
            super()._save(output_dir, state_dict)

    def summary(self) -> dict[str, Any]:
        """Return a summary of the run as JSON values."""
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        # A run shorter than `logging_steps` logs no loss.
        logged = {"first and last logged loss": [round(loss, 4) for loss in (losses[0], losses[-1])]} if losses else {}
        return {
            "mode": self.args.mode,
            "adapters": self.args.trains_adapters,
            **frozen_share(self.model, self.args.trains_adapters),
            "steps": self.state.global_step,
            "sequences per step": self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size,
            "learning rate": self.args.learning_rate,
            **self._amounts(),
            **logged,
        }

    def _amounts(self) -> dict[str, Any]:
        """Return how much of what data the model was trained and evaluated on, and the best state, for the record."""
        lengths = [len(row) for row in self.train_dataset.with_format("numpy")["input_ids"]]  # type: ignore[union-attr]
        amounts: dict[str, Any] = {
            "trained parameters": self._trained_parameters,
            "sequences": len(lengths),
            "tokens": sum(lengths),
            "passes over the data": round(float(self.state.epoch or 0), 2),
        }
        if self.args.load_best_model_at_end and self.state.best_metric is not None:
            amounts["best held-out loss"] = round(self.state.best_metric, 4)
            amounts["best step"] = self.state.best_global_step
        return amounts

    def _distillation_loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """(1 - w) · cross-entropy + w · divergence from the teacher + h · error of hidden states, by counted token."""
        logits, ids, hidden, mask = self._predicted
        counted = labels[:, 1:] != IGNORED
        student = outputs.logits[:, :-1][counted]
        count = int(counted.sum()) if num_items_in_batch is None else num_items_in_batch
        cross_entropy, divergence = distillation_terms(
            student,
            labels[:, 1:][counted],
            logits[:, :-1][counted],
            None if ids is None else ids[:, :-1][counted],
            self.args.temperature,
        )
        weight = self.args.distill_weight
        loss = ((1 - weight) * cross_entropy + weight * divergence) / count
        if hidden is not None:
            present = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
            own, wanted = (
                [state.to(loss.device)[present] for state in states] for states in (outputs.hidden_states, hidden)
            )
            # It is a mean over places. The share lets it be summed over the batches of a step, like the other terms.
            share = int(counted.sum()) / count
            loss = loss + self.args.hidden_weight * share * hidden_error(own, wanted)
        if outputs.logits.requires_grad:  # Evaluations during training do not count.
            tokens = max(1, int(counted.sum()))
            for name, value in (("cross_entropy", cross_entropy), ("divergence", divergence)):
                self._parts[name] = self._parts.get(name, 0.0) + float(value.detach()) / tokens
            self._batches += 1
        return loss


def frozen_share(model: Any, trains_adapters: bool) -> dict[str, str]:
    """Return an entry for the record on the weights that a user froze; an empty one where all were trained.

    Args:
        model (`PreTrainedModel`): the model after training.
        trains_adapters (`bool`): whether adapters were trained; all other weights are frozen then.
    """
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    frozen = sum(size for size, trained in sizes if not trained)
    if trains_adapters or not frozen:
        return {}
    return {"frozen": f"{frozen:,} of {sum(size for size, _ in sizes):,} parameters"}


class StepCounter(TrainerCallback):
    """Counts the steps that changed the weights, also in a run that ends with an error.

    Attributes:
        steps (`int`): steps taken so far.
    """

    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps = state.global_step
