"""`FwdPruner`: from a dense model to a checkpoint, with no algorithm of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .allocation.plan import PruningPlan
from .architectures import get_architecture
from .architectures.wrapping import check_plain, is_peft_model, plain_model
from .checkpoint.writing import WritesCheckpoints
from .evaluation import Comparison
from .loading.opening import open_model
from .loading.origin import Origin
from .loading.source import Source
from .loading.state import check_not_consumed
from .loading.tokenizers import named_tokenizer
from .planning.checks import check_arguments
from .planning.latency import LatencyTable
from .pruning import Pruning
from .record.attributes import Recorded
from .record.reading import read_record, with_outcome
from .record.record import Record
from .report import PruningReport
from .runs.devices import host_by_default
from .scoring.methods import PruningConfig
from .scoring.scores import Scores


if TYPE_CHECKING:
    from .recovery import RecoveryArguments, RecoveryTrainer
    from .recovery.recovering import Recovery


class FwdPruner(WritesCheckpoints):
    """Prunes a causal language model, or any other task head of a supported family, with forward passes only.

    ```python
    pruner = FwdPruner.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    model = pruner.prune(PruningConfig(method="wanda_sp", sparsity=0.3))
    pruner.save_pretrained("smollm2-pruned")
    ```

    Args:
        model (`PreTrainedModel`): a model of a supported family, dense or pruned before.
        tokenizer (`PreTrainedTokenizerBase`, `str` or `Path`, *optional*): a tokenizer, or its folder or repository;
            needed to calibrate on text, and saved beside the model.

    Raises:
        ValueError: where the model is not a plain one of a supported family: a name, a wrapper (PEFT, `torch.compile`,
            DDP, a pipeline), a model with adapters inside it, or a quantized one. The message names the way out.

    Attributes:
        comparison (`Comparison`, *optional*): set it to what [`~optimum_fwdprune.evaluation.compare`] found, this
            model last, and the model card and reports of the checkpoint show it; pruning or training the model anew
            drops it.
        model (`PreTrainedModel`): the dense model, and the pruned one after `prune`. Another model can be assigned;
            the attributes below are then what is known of that one.
        plan (`PruningPlan`, *optional*): what `prune` kept.
        report (`PruningReport`, *optional*): what it did: `print` shows it, and `report.save("report.html")` writes a
            page with pictures.
        scores (`Scores`, *optional*): the last scores, for another budget or to save; after several rounds those of
            the last, which are of the model before it.
        config (`PruningConfig`, *optional*): the last request.
        trainer (`RecoveryTrainer`, *optional*): of the last `recover`; its `state.log_history` says how it went.
        recovery (`dict`, *optional*): how the model was trained after it was pruned, here or before it was loaded:
            JSON values.
    """

    plan = Recorded[PruningPlan | None]()
    scores = Recorded[Scores | None]()
    config = Recorded[PruningConfig | None]()
    recovery = Recorded[dict[str, Any] | None]()
    comparison = Recorded[Comparison | None]()

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | str | Path | None = None):
        _check_supported(model)
        self._model = model
        self.tokenizer = None if tokenizer is None else named_tokenizer(tokenizer)
        self.trainer: RecoveryTrainer | None = None
        self._record = Record()
        self._source = Source()
        # Of the model as it is, so that scoring and pruning measure it once.
        self._latencies: LatencyTable | None = None

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        *,
        low_memory: bool = False,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        **kwargs,
    ) -> FwdPruner:
        """Load a model and its tokenizer; of a pruned checkpoint also its plan and request.

        It is loaded for the task that the checkpoint was saved for, a causal language model where it does not say.

        Args:
            model_id (`str` or `Path`): repository of the Hub, or folder.
            low_memory (`bool`, defaults to `False`): leave the decoder layers on disk. `prune` then reads, cuts and
                writes one after the other, and the pruned model's stay on disk too: one layer is in memory at a time,
                beside embeddings, head and statistics. Temporary files lie in `offload_folder`, by default that of
                the system.
            tokenizer (`PreTrainedTokenizerBase`, `str` or `Path`, *optional*): a tokenizer, or its folder or
                repository; by default the one that lies beside the model.
            kwargs: for the Auto class's `from_pretrained`: `dtype` (the checkpoint's by default), `device_map`
                (the CPU by default; under `accelerate launch` the accelerator of each process),
                `attn_implementation`, `gguf_file`, `revision`, `token`, `trust_remote_code`, ...

        Raises:
            OSError: where a file is missing or damaged, naming it.
            ValueError: where the family is not supported, the folder holds adapters without their base, the plan of a
                pruned checkpoint is not that of its weights, or the tokenizer cannot be read, naming the packages
                that are missing.
        """
        model, opened_tokenizer, source = open_model(model_id, tokenizer, low_memory, kwargs)
        pruner = cls(model, opened_tokenizer)
        pruner._record, pruner._source = read_record(model, model_id, source)
        return pruner

    @property
    def model(self) -> PreTrainedModel:
        return self._model

    @model.setter
    def model(self, model: Any) -> None:
        if not is_peft_model(model):
            _check_supported(model)
        known, plain = plain_model(self._model), plain_model(model)
        get_architecture(plain.config).pruned_class(plain)
        self._model = model
        if plain is known:
            return
        record: Record | None = getattr(plain, "pruning_record", None)
        is_namesake = plain.config._name_or_path == known.config._name_or_path
        if record is None and (is_namesake if self.plan is None else self._record.plan_of(model) is not None):
            # Loaded anew, or trained elsewhere.
            return
        if record is not None and (record.plan, record.config) == (self.plan, self.config):
            return
        self._record = with_outcome(record or Record(), plain)
        self._source = self._source.not_saved()
        self.trainer = self._latencies = None
        if not is_namesake:
            self._source = self._source.of_another_model(self.plan.metadata if self.plan else {})

    @property
    def report(self) -> PruningReport | None:
        return PruningReport.of(self._record)

    @report.setter
    def report(self, report: PruningReport | None) -> None:
        self._record = dataclasses.replace(self._record, outcome=report)

    @host_by_default()
    def score(self, config: PruningConfig | str | None = None, dataset: Any = None, **fields) -> Scores:
        """Score every unit, and gather what the request's reconstruction will need, without changing the model.

        Args:
            config (`PruningConfig` or `str`, *optional*): method and calibration, or the name of a preset; by default
                those of `prune()`.
            dataset (*optional*): calibration text or tokens instead of `config.calibration`; see
                [`~optimum_fwdprune.data.load_calibration.load_calibration`].
            fields: options of `PruningConfig` by name, which override those of `config`.

        Returns:
            `Scores`: to inspect, to save, or to hand to `prune` with other budgets.

        Raises:
            ValueError: on NaN in weights, activations or scores, naming where.
        """
        request = PruningConfig.of(config, **fields)
        with self._pruning(dataset) as pruning:
            return pruning.score(request)

    @host_by_default()
    def prune(
        self,
        config: PruningConfig | str | None = None,
        dataset: Any = None,
        *,
        plan: PruningPlan | None = None,
        scores: Scores | None = None,
        inplace: bool = True,
        **fields,
    ) -> PreTrainedModel:
        """Prune the model.

        ```python
        pruner.prune()  # the defaults: 20 % of the prunable parameters
        pruner.prune(sparsity=0.3)
        pruner.prune("best", sparsity=0.4)
        pruner.prune(PruningConfig(method="flap"))
        ```

        Before any work is done, what the request will remove is logged.

        Args:
            config (`PruningConfig` or `str`, *optional*): the request, or the name of a preset. The default is the
                preset `balanced`, whose recipe is the defaults of [`PruningConfig`].
            dataset (*optional*): calibration text or tokens instead of `config.calibration`.
            plan (`PruningPlan`, *optional*): replay this plan instead of scoring and allocating. Weights are
                reconstructed only where a config, a preset or the option `reconstruction` is given as well. Options of
                a config that the plan decides are ignored, and not recorded.
            scores (`Scores`, *optional*): allocate by these instead of scoring again. The options of their method, the
                seed and the calibration are those that they were made with, with a warning where the request names
                others. Scores of a checkpoint have no tokens: what needs them reads those of the request.
            inplace (`bool`, defaults to `True`): consume the dense model. `False` leaves it whole, and needs memory
                for both.
            fields: options of `PruningConfig` by name, which override those of `config`.

        Returns:
            `PreTrainedModel`: the pruned model, which is `self.model` from then on.

        Raises:
            ValueError: where the request cannot be met, naming the constraint.
            RuntimeError: where the pruned model does not compute what the masked dense model computes.

        What can be checked is checked before anything is measured, and until surgery the dense model is whole. An
        error during or after surgery carries a note on what `self.model` is then: the pruned model where surgery was
        complete, what earlier rounds came to, or a model that was consumed and must be loaded again.
        """
        check_arguments(plan, scores)
        request = PruningConfig.of(config, replays=plan is not None, **fields)
        with self._pruning(dataset) as pruning:
            pruning.prune(request, plan, scores, inplace, fields.keys())
        return self.model

    def recover(
        self,
        dataset: Any,
        args: RecoveryArguments | None = None,
        *,
        teacher: PreTrainedModel | str | Path | Origin | None = None,
        eval_dataset: Any = None,
        callbacks: list[Any] | None = None,
    ) -> PreTrainedModel:
        """Train the pruned model until it is as good as it can be again.

        Args:
            dataset: text, chats or instructions: a file, a dataset of the Hub or in memory, strings, token ids; see
                [`~optimum_fwdprune.recovery.training_data`].
            args (`RecoveryArguments`, *optional*): how; by default LoRA adapters for one epoch, merged in the end.
            teacher (`PreTrainedModel`, `str` or `Path`, *optional*): for `mode="distill"`: the dense model, or where
                it is; by default the model that was pruned: its repository and commit, or its folder, which is
                recognised by a fingerprint of its weights and remembered in the Hugging Face cache of this machine.
            eval_dataset (*optional*): of the same kinds, for the Trainer's `eval_strategy`.
            callbacks (`list` of `TrainerCallback`, *optional*): the Trainer's, such as `EarlyStoppingCallback`.

        Where training fails or is interrupted, adapters are removed and the model is what it was; a model of which all
        weights are trained keeps what training had made of them, and `self.recovery` records that it was interrupted.

        Returns:
            `PreTrainedModel`: the trained model, which is `self.model` from then on; a `PeftModel` where
            `args.merge_adapters` is off, of which `save_pretrained` saves the adapters alone.

        Raises:
            ValueError: before anything is trained, where the model is dense, has adapters in it or offloaded layers,
                and where the data, the teacher or a checkpoint to resume from does not fit.
        """
        # The Trainer takes a second to import.
        from .recovery.data import TrainingTexts
        from .recovery.recovering import Recovery

        recovery = Recovery(self.model, self._record, self._source)
        try:
            recovery.run(TrainingTexts(dataset, self.tokenizer, eval_dataset), args, teacher, callbacks)
        finally:
            self._take_over(recovery, recovery.trainer)
        return self.model

    @contextmanager
    def _pruning(self, dataset: Any) -> Iterator[Pruning]:
        """Begin a pruning of the model, and take over what it came to, also where it fails."""
        pruning = Pruning(self.model, self.tokenizer, dataset, self._record, self._source, self._latencies)
        try:
            yield pruning
        finally:
            self._latencies = pruning.latencies
            self._take_over(pruning)

    def _take_over(self, work: Pruning | Recovery, trainer: RecoveryTrainer | None = None) -> None:
        """Take over what a pruning or a recovery made of the model, also where it failed."""
        self._model, self._record, self._source = work.model, work.record, work.source
        if work.has_changed:
            self.trainer = trainer


def _check_supported(model: Any) -> None:
    """Raise `ValueError` where a model cannot be pruned here, whatever the request."""
    check_plain(model)
    check_not_consumed(model)
    get_architecture(model.config).pruned_class(model)
