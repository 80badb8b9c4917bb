"""`FwdPruner`, the main class: it prunes, trains and saves models by calling the other rooms."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from .allocation.plan import PruningPlan
from .architectures import get_architecture
from .architectures.wrapping import check_plain, is_peft_model, plain_model
from .checkpoint.writing import WritesCheckpoints
from .data.images import with_processor
from .evaluation import Comparison
from .loading.opening import open_model
from .loading.source import Source
from .loading.state import check_not_consumed
from .loading.tokenizers import AnyTokenizer, tokenizer_and_processor
from .planning.checks import check_arguments
from .planning.dry_run import DryRun
from .planning.latency import LatencyTable
from .pruning import Pruning
from .record.attributes import Recorded
from .record.reading import read_record, with_outcome
from .record.record import Record
from .recovery.recovers import Recovers
from .report import PruningReport
from .runs.devices import host_by_default
from .scoring.methods import PruningConfig
from .scoring.scores import Scores
from .sweep.sweeps import Sweeps


if TYPE_CHECKING:
    from .recovery import RecoveryTrainer
    from .recovery.recovering import Recovery


class FwdPruner(WritesCheckpoints, Sweeps, Recovers):
    """Prunes a causal language model, or any other task head of a supported family, with forward passes only.

    ```python
    pruner = FwdPruner.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    model = pruner.prune(PruningConfig(method="wanda_sp", sparsity=0.3))
    pruner.save_pretrained("smollm2-pruned")
    ```

    Args:
        model (`PreTrainedModel`): a model of a supported family, dense or pruned before.
        tokenizer (`PreTrainedTokenizerBase`, `ProcessorMixin`, `str` or `Path`, *optional*): a tokenizer, its folder
            or repository, or the processor of a multimodal model; required for calibration on text, and saved too.

    Raises:
        ValueError: where the model is not a plain model of a supported family, but a name, a wrapper (PEFT,
            `torch.compile`, DDP, a pipeline), a model with adapters inside it, or a quantized one. The message names
            the way out.

    Attributes:
        comparison (`Comparison`, *optional*): measurements that the model card and reports show. Assign the result of
            [`~optimum_fwdprune.evaluation.compare`], with this model last. Pruning or training the model again sets it
            to `None`.
        model (`PreTrainedModel`): the dense model, and after `prune` the pruned one. Another model can be assigned;
            the attributes below then describe that one.
        plan (`PruningPlan`, *optional*): the units that `prune` kept.
        report (`PruningReport`, *optional*): the result of `prune`; `print` shows it, and `report.save("report.html")`
            writes a page with pictures.
        scores (`Scores`, *optional*): the last scores, which can be saved, or used for another budget. After several
            rounds they are those of the last round, for the units of the model before that round.
        config (`PruningConfig`, *optional*): the last request.
        trainer (`RecoveryTrainer`, *optional*): the trainer of the last `recover`, with its `state.log_history`.
        recovery (`dict`, *optional*): how the model was trained after it was pruned, here or before it was loaded, as
            JSON values.
    """

    plan = Recorded[PruningPlan | None]()
    scores = Recorded[Scores | None]()
    config = Recorded[PruningConfig | None]()
    recovery = Recorded[dict[str, Any] | None]()
    comparison = Recorded[Comparison | None]()

    def __init__(self, model: PreTrainedModel, tokenizer: AnyTokenizer | None = None):
        _check_supported(model)
        self._model = model
        self.tokenizer, self.processor = tokenizer_and_processor(tokenizer)
        self.trainer: RecoveryTrainer | None = None
        self._record = Record()
        self._source = Source()
        self._latencies: LatencyTable | None = None  # Of the current model, measured once for all of its requests.

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        *,
        low_memory: bool = False,
        tokenizer: AnyTokenizer | None = None,
        with_weights: bool = True,
        **kwargs,
    ) -> FwdPruner:
        """Load a model and its tokenizer, and of a pruned checkpoint also its plan and request.

        The model is loaded for the task that the checkpoint was saved for, by default as a causal language model.

        Args:
            model_id (`str` or `Path`): repository of the Hub, or folder.
            low_memory (`bool`, defaults to `False`): leave the decoder layers on disk. `prune` then reads, cuts and
                writes one layer after the other, and those of the pruned model stay on disk too. In memory are one
                layer at a time, embeddings, head and statistics. Temporary files are written to `offload_folder`, by
                default the system's folder.
            tokenizer (`PreTrainedTokenizerBase`, `str` or `Path`, *optional*): a tokenizer, or its folder or
                repository; by default the model's own.
            with_weights (`bool`, defaults to `True`): whether the weights are read. Without them, the model can be
                inspected and pruned in a `dry_run`. Nothing but the config and the tokenizer is downloaded then.
            kwargs: arguments of the Auto class's `from_pretrained`: `dtype` (the checkpoint's by default),
                `device_map` (the CPU by default; under `accelerate launch` the accelerator of each process),
                `attn_implementation`, `gguf_file`, `revision`, `token`, `trust_remote_code`, ...

        Raises:
            OSError: where a file is missing or damaged; the message names the file.
            ValueError: where the family is not supported, the folder holds adapters without their base, the plan of a
                pruned checkpoint does not fit its weights, or the tokenizer cannot be read (the message names missing
                packages).
        """
        model, opened_tokenizer, source = open_model(model_id, tokenizer, low_memory, kwargs, with_weights)
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
            # It is the same model, loaded again or trained by the user.
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
        """Score every unit, and collect the statistics for the request's reconstruction, without changing the model.

        Args:
            config (`PruningConfig` or `str`, *optional*): method and calibration, or the name of a preset; by default
                those of `prune()`.
            dataset (*optional*): calibration data instead of `config.calibration`; see `load_calibration`.
            fields: options of `PruningConfig` by name, which override those of `config`.

        Returns:
            `Scores`: scores that can be inspected, saved, or passed to `prune` with other budgets.

        Raises:
            ValueError: where weights, activations or scores contain NaN; the message names the place.
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

        A forecast of the result is logged before any work is done.

        Args:
            config (`PruningConfig` or `str`, *optional*): the request, or the name of a preset. The default is the
                preset `balanced`, which has the defaults of [`PruningConfig`].
            dataset (*optional*): calibration text or tokens, which replace `config.calibration`.
            plan (`PruningPlan`, *optional*): plan to replay; nothing is scored or allocated then. Weights are
                reconstructed only if a config, a preset or the option `reconstruction` is passed as well. Options of a
                config that the plan determines are ignored, and not recorded.
            scores (`Scores`, *optional*): scores to allocate by; nothing is scored then. The options of their method,
                the seed and the calibration are those of the scores, with a warning where the request names others.
                Scores of a checkpoint have no tokens, so that stages that need tokens use those of the request.
            inplace (`bool`, defaults to `True`): prune the dense model itself. `False` keeps it unchanged, and needs
                memory for both models.
            fields: options of `PruningConfig` by name, which override those of `config`.

        Returns:
            `PreTrainedModel`: the pruned model, which is `self.model` from then on.

        Raises:
            ValueError: where the request cannot be met; the message names the constraint.
            RuntimeError: where the outputs of the pruned model differ from those of the masked dense model.

        All checks that are possible are made before anything is measured, and the dense model is unchanged until
        surgery starts. An error during or after surgery has a note on the state of `self.model`: the pruned model if
        surgery was complete, the result of earlier rounds, or a model that was consumed and must be loaded again.
        """
        check_arguments(plan, scores)
        request = PruningConfig.of(config, replays=plan is not None, **fields)
        with self._pruning(dataset) as pruning:
            pruning.prune(request, plan, scores, inplace, fields.keys())
        return self.model

    @host_by_default()
    def dry_run(
        self,
        config: PruningConfig | str | None = None,
        dataset: Any = None,
        *,
        plan: PruningPlan | None = None,
        **fields,
    ) -> DryRun:
        """Return what `prune` would lead to: sizes, by layer where scores do not decide them, memory and time.

        Nothing is scored, and the model is not changed. The arguments, the checks and the errors are those of `prune`.

        ```python
        print(FwdPruner.from_pretrained("HuggingFaceTB/SmolLM2-135M", with_weights=False).dry_run(sparsity=0.3))
        ```
        """
        check_arguments(plan, None)
        request = PruningConfig.of(config, replays=plan is not None, **fields)
        with self._pruning(dataset) as pruning:
            return pruning.dry_run(request, plan)

    @contextmanager
    def _pruning(self, dataset: Any) -> Iterator[Pruning]:
        """Start a pruning of the model, and keep its results, also if it fails."""
        data = with_processor(dataset, self.model, self.processor)
        pruning = Pruning(self.model, self.tokenizer, data, self._record, self._source, self._latencies)
        try:
            yield pruning
        finally:
            self._latencies = pruning.latencies
            self._take_over(pruning)

    def _take_over(self, work: Pruning | Recovery, trainer: RecoveryTrainer | None = None) -> None:
        """Keep the model, record and source that a pruning or a recovery has produced."""
        self._model, self._record, self._source = work.model, work.record, work.source
        self.trainer = trainer if work.has_changed else self.trainer


def _check_supported(model: Any) -> None:
    """Raise `ValueError` where a model cannot be pruned by any request."""
    check_plain(model)
    check_not_consumed(model)
    get_architecture(model.config).pruned_class(model)
