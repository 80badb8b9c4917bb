"""The methods of `FwdPruner` that train the pruned model. Importing this module does not import the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..loading.origin import Origin
from ..loading.source import Source
from ..record.record import Record
from ..runs.devices import host_by_default
from ..scoring.methods import PruningConfig


if TYPE_CHECKING:
    from . import RecoveryArguments, RecoveryRequest, RecoveryTrainer


class Recovers:
    """A base class of `FwdPruner`, which trains its model."""

    _model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    trainer: RecoveryTrainer | None
    _record: Record
    _source: Source
    # Starts a pruning of the model on a dataset, and keeps its results.
    _pruning: Callable[[Any], AbstractContextManager[Any]]
    # Keeps the model, the record and the source of a pruning or a recovery, and the trainer of the latter.
    _take_over: Callable[..., None]

    @host_by_default()
    def prune_and_recover(
        self,
        recovery: RecoveryRequest,
        config: PruningConfig | str | None = None,
        dataset: Any = None,
        *,
        inplace: bool = True,
        **fields,
    ) -> PreTrainedModel:
        """Prune the model in rounds, and train it after every round.

        ```python
        arguments = RecoveryArguments(output_dir="training", mode="distill", tokens="1M")
        pruner.prune_and_recover(RecoveryRequest("wikitext2", arguments), sparsity=0.4, rounds=3, resume="states")
        ```

        A round scores the units of the model that the previous one trained, plans, cuts, reconstructs and trains. With
        `resume`, an interrupted run resumes in the round and at the checkpoint that it had reached, and ends with the
        same weights. The checkpoints of the training are then in that folder, and otherwise in a folder per round in
        `output_dir`.

        Args:
            recovery (`RecoveryRequest`): the training data, and the arguments of every training.
            config (`PruningConfig` or `str`, *optional*): the request, or the name of a preset.
            dataset (*optional*): calibration data, which replaces `config.calibration`.
            inplace (`bool`, defaults to `True`): whether the model itself is pruned, and not a copy.
            fields: options of `PruningConfig` by name; `rounds` is 1 by default.

        Returns:
            `PreTrainedModel`: the pruned and trained model, which is `self.model` from then on. `self.plan` combines
            all rounds, and `self.recovery` lists the training of every round.

        Raises:
            ValueError: before anything is measured, where the request, the arguments, the data or the teacher do not
                fit; also for a model that was opened with `low_memory`.
        """
        from .rounds import RoundRecovery

        training = RoundRecovery(recovery, self.tokenizer)
        request = PruningConfig.of(config, **fields)
        with self._pruning(dataset) as pruning:
            pruning.prune(request, None, None, inplace, fields.keys(), training)
        self.trainer = training.trainer
        return self._model

    def recover(
        self,
        dataset: Any,
        args: RecoveryArguments | None = None,
        *,
        teacher: PreTrainedModel | str | Path | Origin | None = None,
        eval_dataset: Any = None,
        callbacks: list[Any] | None = None,
    ) -> PreTrainedModel:
        """Train the pruned model to recover its quality.

        Args:
            dataset: text, chats or instructions: a file, a dataset of the Hub or in memory, strings, token ids; see
                [`~optimum_fwdprune.recovery.training_data`].
            args (`RecoveryArguments`, *optional*): arguments of the training; the default trains and merges adapters.
            teacher (`PreTrainedModel`, `str` or `Path`, *optional*): for `mode="distill"`, the dense model, or its
                folder or repository. By default it is the model that was pruned, in its repository and commit or in
                its folder, which is stored in the Hugging Face cache and recognized by a fingerprint of its weights.
            eval_dataset (*optional*): held-out data of the same kinds, for the Trainer's `eval_strategy`.
            callbacks (`list` of `TrainerCallback`, *optional*): the Trainer's, such as `EarlyStoppingCallback`.

        If training fails or is interrupted, adapters are removed, which leaves the model as it was. After a training
        of all weights, the model keeps the weights of the last step, and `self.recovery` records the interruption.

        Returns:
            `PreTrainedModel`: the trained model, which is `self.model` from then on. It is a `PeftModel` where
            `args.merge_adapters` is off; `save_pretrained` then saves the adapters only.

        Raises:
            ValueError: before training starts, where the model is dense, has adapters in it or offloaded layers,
                and where the data, the teacher or a checkpoint to resume from does not fit.
        """
        # The Trainer takes a second to import.
        from .data import TrainingTexts
        from .recovering import Recovery

        recovery = Recovery(self._model, self._record, self._source)
        try:
            recovery.run(TrainingTexts(dataset, self.tokenizer, eval_dataset), args, teacher, callbacks)
        finally:
            self._take_over(recovery, recovery.trainer)
        return self._model
