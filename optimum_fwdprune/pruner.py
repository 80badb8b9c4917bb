"""`FwdPruner`: from a dense model to a checkpoint, with no algorithm of its own."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .allocation.composing import EarlierPruning
from .allocation.job import resume_held
from .allocation.plan import PruningPlan
from .architectures import find_sites, get_architecture, is_pruned
from .architectures.wrapping import (
    check_no_adapters,
    check_plain,
    is_peft_model,
    plain_model,
)
from .checkpoint.hub import (
    check_name,
    check_upload,
    upload,
)
from .cutting.cut import Cut
from .cutting.on_disk import files_of
from .data.load_calibration import load_calibration
from .evaluation import Comparison
from .files import check_output_folder, folder_moved_into_place
from .loading.base import Base
from .loading.models import (
    ACCESS,
    FOLDER_OTHERWISE,
    WHERE,
    auto_class_of,
    check_is_model,
    check_unquantized,
    load_for_task,
)
from .loading.offline import naming_offline
from .loading.offloading import check_readable, device_map_on_disk, is_offloaded
from .loading.origin import FINGERPRINT, NAME, REVISION, Origin
from .loading.placement import placed
from .loading.saving import (
    check_savable,
    generation_config_as_it_is,
    naming_base,
    save_offloaded,
)
from .loading.state import (
    check_not_consumed,
    evaluating,
    forward_state_kept,
    is_consumed,
)
from .loading.subject import Sizes, Subject
from .loading.tokenizers import load_tokenizer, named_tokenizer, warn_of_missing_tokenizer
from .planning.checks import check_arguments, check_model, check_request
from .planning.latency import LatencyTable
from .planning.make_plan import (
    request_of_replay,
)
from .planning.run import Run
from .record.record import Record
from .record.reproduction import IN_MEMORY, INPUTS, inputs_of
from .report import PruningReport, Speedup
from .report.card import write_card
from .report.checkpoint import report_of
from .runs import ranks
from .runs.devices import host_by_default
from .runs.loggers import get_logger
from .runs.progress import one_step
from .scoring.methods import PruningConfig
from .scoring.scores import Scores
from .words import public_name


if TYPE_CHECKING:
    from .recovery import RecoveryArguments, RecoveryTrainer

logger = get_logger(__name__)


class FwdPruner:
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

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | str | Path | None = None):
        _check_supported(model)
        self._model = model
        self.tokenizer = None if tokenizer is None else named_tokenizer(tokenizer)
        self.plan: PruningPlan | None = None
        self.report: PruningReport | None = None
        self.scores: Scores | None = None
        self.config: PruningConfig | None = None
        self.trainer: RecoveryTrainer | None = None
        self.recovery: dict[str, Any] | None = None
        self.comparison: Comparison | None = None
        self._base: Base | None = None
        # Arguments of `from_pretrained`; none for a model that was passed in memory.
        self._loading: dict[str, Any] | None = None
        # Whether decoder layers stay on disk, and where temporary files lie.
        self._low_memory = False
        self._offload_folder: str | Path | None = None
        # Of the dense model, so that scoring and pruning measure it once.
        self._latencies: LatencyTable | None = None
        # What opened the repository opens that of a teacher.
        self._access: dict[str, Any] = {}
        # Where the model that was pruned may be.
        self._source_folders: tuple[Path, ...] = ()
        # Where the pruned model lies as it is now: what adapters can name as their base.
        self._saved_as: str | None = None

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
        kwargs.setdefault("dtype", "auto")
        shared = {name: kwargs[name] for name in (*WHERE, "trust_remote_code") if name in kwargs}
        check_is_model(model_id, {name: kwargs[name] for name in WHERE if name in kwargs})
        auto_class: Any = AutoModelForCausalLM
        if "gguf_file" in kwargs:
            # Reading the config of a GGUF file costs as much as reading all of it.
            shared["gguf_file"] = kwargs["gguf_file"]
        else:
            # A family that is not supported fails before gigabytes are read.
            with naming_offline(model_id, FOLDER_OTHERWISE):
                config = AutoConfig.from_pretrained(model_id, **shared)
            auto_class = auto_class_of(config)
            check_unquantized(model_id, config, kwargs.get("quantization_config"))
        if low_memory:
            if "gguf_file" in kwargs or "device_map" in kwargs:
                raise ValueError(
                    "low_memory=True reads the decoder layers from safetensors files, one by one; leave out gguf_file "
                    "and device_map."
                )
            kwargs["device_map"] = device_map_on_disk(config, auto_class)
        # A tokenizer that was passed in memory has no name.
        named = {"tokenizer": public_name(str(tokenizer))} if isinstance(tokenizer, (str, Path)) else {}
        # Before gigabytes are read.
        if tokenizer is not None:
            tokenizer = named_tokenizer(tokenizer, **{name: kwargs[name] for name in ACCESS if name in kwargs})
        else:
            tokenizer = load_tokenizer(model_id, **shared)
        if tokenizer is None:
            logger.warning(
                "%s has no tokenizer; calibration can use token ids and the model's own text only. Name one with "
                "tokenizer=... (--tokenizer).",
                model_id,
            )
        model = load_for_task(model_id, auto_class, **placed(kwargs))
        pruner = cls(model, tokenizer)
        pruner._loading = {**kwargs, **named}
        pruner._low_memory, pruner._offload_folder = low_memory, kwargs.get("offload_folder")
        for name in ("gguf_file", "trust_remote_code"):
            shared.pop(name, None)
        pruner._base = Base.of(model_id, **shared)
        pruner._access = {name: kwargs[name] for name in ACCESS if name in kwargs}
        if is_pruned(model.config):
            record = Record.of_checkpoint(model_id, **shared)
            if record.plan is not None:
                record.plan.check_left(find_sites(model, record.plan.attention_unit))
            pruner._take_up(record)
            pruner._keep_record()
            pruner._saved_as = str(model_id)
            if record.plan is not None and Path(model_id).is_dir():
                # Checkpoints often lie beside the model that they were pruned from.
                name = Path(str(record.plan.metadata.get(NAME) or "")).name
                pruner._source_folders = (Path(model_id).absolute().parent / name,) if name else ()
            if record.plan is not None and (source := record.plan.metadata.get("source")):
                # Its card carries the licence of what was pruned.
                pruner._base = dataclasses.replace(pruner._base, name=source, is_repository="/" in source)
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
        if record is None and (is_namesake if self.plan is None else self._plan_of_model() is not None):
            # Loaded anew, or trained elsewhere.
            return
        if record is not None and (record.plan, record.config) == (self.plan, self.config):
            return
        self._take_up(record or Record(None, None, None))
        self.trainer = self._latencies = self._saved_as = None
        if not is_namesake:
            source = str(self.plan.metadata.get("source") or "") if self.plan is not None else ""
            self._base = Base(source, is_repository="/" in source) if source else None
            self._loading, self._source_folders = None, ()

    def _take_up(self, record: Record) -> None:
        """Take what is known of how the model was pruned."""
        self.config, self.plan, self.scores = record.config, record.plan, record.scores
        self.report = None if record.plan is None else report_of(self.model, record)
        measured = record.outcome.get("comparison")
        self.comparison = Comparison.from_list(measured) if measured else None
        self.recovery = record.outcome.get("recovery")

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
        config = PruningConfig.of(config, **fields)
        subject = self._subject(config)
        check_model(subject)
        run = Run(subject, self.tokenizer, dataset, latencies=self._latencies)
        try:
            with resume_held(config):
                self.scores = run.score(config)
        finally:
            self._latencies = run.latencies
        return self.scores

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
        config = PruningConfig.of(config, replays=plan is not None, **fields)
        if plan is not None:
            config = dataclasses.replace(config, attention_unit=plan.attention_unit)
        subject = self._subject(config)
        check_request(subject, config, plan, scores)
        if scores is not None:
            config = scores.options_into(config, fields.keys())
        asked = config if plan is None else request_of_replay(plan, config)
        before, inputs = Sizes.of(self.model, subject.sites), self._inputs(config, dataset, scores)
        earlier = EarlierPruning.of(self.model, subject.sites, self._plan_of_model(), self.recovery)
        source = Origin.of(self.model.config, {name: value for name, value in self._access.items() if name in WHERE})

        def keep(done: Cut) -> None:
            origin = {key: value for key, value in done.plan.metadata.items() if key not in (FINGERPRINT, REVISION)}
            plan = dataclasses.replace(done.plan, metadata={**origin, **source.to_metadata(), INPUTS: inputs})
            self._model, self.plan, self.config = done.model, _of_dense_model(plan, earlier), asked
            source.remember()
            self._source_folders = source.folders
            self.trainer = self.recovery = self.report = self._saved_as = self.comparison = None

        # A dense model that is not consumed stays, whatever happens to the pruned one.
        finished = keep if inplace else _ignored
        run = Run(subject, self.tokenizer, dataset, inplace, finished, self._latencies)
        with self._noting_what_is_left(run), resume_held(config):
            done = run.prune(config, scores) if plan is None else run.replay(plan, config)
            keep(done)
            if earlier is not None and earlier.followed_by(done.plan) is None:
                logger.warning("%s", earlier.why_apart(done.plan))
            self.scores = run.scores
            after, speedup = Sizes.of(self.model), None
            if config.target_speedup is not None and run.speedup is not None:
                speedup = Speedup(config.target_speedup, *run.speedup)
            self.report = PruningReport(
                parameters_before=before.parameters,
                parameters_after=after.parameters,
                bytes_before=before.bytes,
                bytes_after=after.bytes,
                prunable_parameters=before.prunable,
                removed_parameters=sum(len(done.plan.removed(key)) * size for key, size in before.per_unit.items()),
                requested_sparsity=done.plan.metadata.get("requested_sparsity"),
                masked_difference=done.difference,
                seconds=run.clock.seconds,
                calibration=run.calibrated_on,
                speedup=speedup,
                unit_parameters=before.per_unit,
                record=Record(asked, self.plan, self.scores),
            )
            self._keep_record()
        return self.model

    def _subject(self, config: PruningConfig) -> Subject:
        """The model as it is, with all its sites in the units of the request."""
        check_not_consumed(self.model)
        check_readable(self.model)
        sites = find_sites(self.model, config.attention_unit)
        return Subject(self.model, sites, self._low_memory, self._offload_folder)

    def _inputs(self, config: PruningConfig, dataset: Any, scores: Scores | None) -> dict[str, Any]:
        """What goes into a pruning beside the request, as JSON values; warns of data that scores make useless."""
        in_memory = dataset is not None and not isinstance(dataset, (str, Path))
        if scores is not None and not scores.reads_anew(config):
            if dataset is not None:
                with evaluating(self.model):
                    scores.check_dataset(load_calibration(config, self.model, self.tokenizer, dataset))
            in_memory = scores.calibrated_on.get("source") in IN_MEMORY
        return inputs_of(self._loading, self.model.dtype, is_pruned(self.model.config), in_memory)

    def _plan_of_model(self) -> PruningPlan | None:
        """The plan that the model was pruned by, where it is known and still describes the model."""
        try:
            if self.plan is not None:
                self.plan.check_left(find_sites(self.model, self.plan.attention_unit))
        except ValueError:
            # It is the plan of another model.
            return None
        return self.plan

    @contextmanager
    def _noting_what_is_left(self, run: Run) -> Iterator[None]:
        """Keep the latencies and scores of a run that fails, which can serve another, and add to the error what
        `self.model` is where it is no longer what it was."""
        before = self.model
        try:
            yield
        except BaseException as error:
            self.scores = run.scores or self.scores
            note = ""
            if is_consumed(self.model):
                note = "Surgery was interrupted, and the model was consumed: load it again."
            elif self.model is not before:
                note = (
                    "pruner.model is the pruned model as far as it was finished, and pruner.plan what it kept; the "
                    "checks and measurements that failed were not made on it."
                )
            if note:
                logger.error("%s", note)
                error.add_note(note)
            raise
        finally:
            self._latencies = run.latencies

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
        from .recovery import RecoveryArguments, recover
        from .recovery.callbacks import checked_callbacks
        from .recovery.trainer import StepCounter, frozen_share

        check_not_consumed(self.model)
        self._check_trainable()
        if args is None:
            args = RecoveryArguments(output_dir="fwdprune_recovery")
        if not isinstance(args, RecoveryArguments):
            raise TypeError(
                f"args must be RecoveryArguments, which extend the Trainer's TrainingArguments; got a "
                f"{type(args).__name__}. Write RecoveryArguments(output_dir=..., ...)."
            )
        callbacks = checked_callbacks(callbacks)
        keeps_adapters = args.trains_adapters and not args.merge_adapters
        if keeps_adapters and self._saved_as is None:
            raise ValueError(
                "Adapters are saved without their base, and the pruned model has not been saved yet: call "
                "save_pretrained first, or leave merge_adapters on."
            )
        if teacher is None and self.plan is not None:
            teacher = Origin.of_plan(self.plan.metadata, self._source_folders)
        data = public_name(str(dataset)) if isinstance(dataset, (str, Path)) else "data in memory"
        counter = StepCounter()
        try:
            with forward_state_kept(self.model):
                self._model, self.trainer = recover(
                    self.model,
                    self.tokenizer,
                    dataset,
                    args,
                    teacher=teacher,
                    eval_dataset=eval_dataset,
                    callbacks=[counter, *callbacks],
                    access=self._access,
                )
        except BaseException as error:
            if counter.steps and not args.trains_adapters:
                # Weights that were trained for a while are not those that were pruned and measured.
                stopped = {"mode": args.mode, "adapters": False, **frozen_share(self.model, trains_adapters=False)}
                stopped |= {"steps": counter.steps, "dataset": data}
                self.recovery = {**stopped, "interrupted by": type(error).__name__}
                self.trainer = self.comparison = self._saved_as = None
                self._keep_record()
            raise
        self.recovery = {**self.trainer.summary(), "dataset": data}
        # What was measured was measured before.
        self.comparison = None
        if keeps_adapters:
            self.model.peft_config["default"].base_model_name_or_path = self._saved_as
        else:
            self._saved_as = None
            self._keep_record()
        return self.model

    def _check_trainable(self) -> None:
        """Raise `ValueError` where recovery cannot train the model, or could not save what it trained."""
        if is_peft_model(self.model):
            raise ValueError(
                "pruner.model has adapters of an earlier training. Merge them first: "
                "pruner.model = pruner.model.merge_and_unload()."
            )
        check_no_adapters(self.model, "recover would train instead of its own")
        if not is_pruned(self.model.config):
            raise ValueError(
                f"recover trains a pruned model, and this {type(self.model).__name__} is dense: call prune() first. "
                f"transformers.Trainer trains dense models."
            )
        if not self.model.can_generate():
            raise ValueError(
                f"recover trains the next-token loss, and a {type(self.model).__name__} predicts no tokens. Train it "
                f"with transformers.Trainer and the labels of its task; save_pretrained of this pruner saves it then."
            )
        if is_offloaded(self.model):
            raise ValueError(
                "Layers of this model are offloaded to the disk or to the CPU, where training would not change them. "
                "Save the model with save_pretrained and load it without low_memory, and without a device_map that "
                "offloads; then call recover."
            )

    def check_saving(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Raise now what `save_pretrained` would raise after hours of work, as far as that can be known.

        Args:
            folder (`str` or `Path`): where the checkpoint is to go.
            overwrite (`bool`, defaults to `False`): as for `save_pretrained`.

        Raises:
            FileExistsError: where the folder is not empty.
            OSError: where it cannot be written.
            ValueError: where the model has adapters in it, or its config, its generation config or the tokenizer
                cannot be saved.
        """
        check_output_folder(folder, overwrite)
        self._check_adapters()
        check_savable(self.model, self.tokenizer)

    def _check_adapters(self) -> None:
        """Raise `ValueError` where the model has adapters that can be saved neither alone nor within it."""
        if not is_peft_model(self.model):
            check_no_adapters(self.model, "a pruned checkpoint cannot hold")
        elif self._saved_as is None:
            raise ValueError(
                "Adapters are saved without their base, and the pruned model has not been saved yet. Save it first, "
                "or merge the adapters: pruner.model = pruner.model.merge_and_unload()."
            )

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        max_shard_size: str = "5GB",
        name: str | None = None,
    ) -> None:
        """Save the pruned model with its tokenizer, plan, request, scores and a model card; of adapters that were not
        merged, these alone.

        The folder appears whole or not at all: everything is written to a temporary sibling first. With several
        processes all of them call this, the main one writes, and the others wait for it.

        Args:
            folder (`str` or `Path`): where to; it must be new or empty.
            overwrite (`bool`, defaults to `False`): replace a folder that is not empty.
            max_shard_size (`str`, defaults to `"5GB"`): largest weight file; of a model with offloaded layers
                every decoder layer has its own.
            name (`str`, *optional*): repository that the model card names; by default the folder.

        Raises:
            FileExistsError: where the folder is not empty.
            OSError: where it cannot be written.
            ValueError: before `prune`.
        """
        ranks.from_main(lambda: self._save(folder, overwrite, max_shard_size, name))
        if isinstance(self.model, PreTrainedModel):
            self._saved_as = str(folder)

    def _save(
        self, folder: str | Path, overwrite: bool, max_shard_size: str, name: str | None, pushed: bool = False
    ) -> None:
        for option, value, kinds in (("max_shard_size", max_shard_size, (int, str)), ("name", name, (str, NoneType))):
            if not isinstance(value, kinds):
                raise TypeError(f"{option} cannot be {value!r:.80} ({type(value).__name__}); leave it out.")
        check_not_consumed(self.model)
        if not is_pruned(self.model.config):
            raise ValueError("There is nothing to save yet; call prune() first.")
        self._check_adapters()
        whole = not is_peft_model(self.model)
        record = self._keep_record() if whole else None
        with folder_moved_into_place(folder, overwrite) as temporary, one_step("Writing the checkpoint"):
            if whole and is_offloaded(self.model):
                save_offloaded(self.model, temporary, files_of(self.model))
            else:
                options: dict[str, Any] = {"max_shard_size": max_shard_size} if whole else {}
                base = naming_base(self.model, str(self._saved_as), pushed) if not whole else nullcontext()
                with base, generation_config_as_it_is(self.model, temporary):
                    self.model.save_pretrained(temporary, **options)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(temporary)
            elif self._base is None:
                # A model that was loaded elsewhere; of others, loading has said so.
                warn_of_missing_tokenizer(self.model.config._name_or_path)
            if record is not None:
                # Modelling code of earlier versions does not write it.
                record.save(temporary)
                name = name or Path(folder).name
                write_card(temporary, name, self.model, record, self._report_now(), self._base, self.comparison)

    def _keep_record(self) -> Record:
        """Return what is known of the pruning, and leave it with the model, whose `save_pretrained` writes it."""
        report = self._report_now()
        measured = self.comparison.to_list() if self.comparison else []
        outcome = {
            "report": report and report.to_dict(),
            # Checkpoints get shared, and home directories do not.
            "comparison": [{**each, "name": Path(each["name"]).name} for each in measured] or None,
            "recovery": self.recovery,
        }
        record = Record(self.config, self.plan, self.scores, outcome)
        vars(self.model)["pruning_record"] = record
        return record

    def _report_now(self) -> PruningReport | None:
        """The report with the sizes of the model as it is: training may have changed its dtype."""
        if self.report is None:
            return None
        now = Sizes.of(self.model)
        return dataclasses.replace(self.report, parameters_after=now.parameters, bytes_after=now.bytes)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload a pruned model",
    ) -> CommitInfo:
        """Upload what `save_pretrained` writes to a repository of the Hub, creating it where it is missing.

        With several processes all of them call this, and the main one does it.

        Args:
            repo_id (`str`): repository id.
            private (`bool`, *optional*): visibility of a new repository.
            token (`str`, *optional*): access token; by default the one that is logged in.
            revision (`str`, *optional*): branch, created where it is missing.
            create_pr (`bool`, defaults to `False`): open a pull request instead of committing.
            commit_message (`str`): of the commit.

        Raises:
            OSError: where the Hub refuses or fails; the pruned model stays as it is, so that it can be tried again.
            ValueError: where `repo_id` is no name of a repository.
        """

        def push() -> dict[str, Any]:
            check_upload(repo_id, token)
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = Path(folder) / "checkpoint"
                self._save(checkpoint, overwrite=False, max_shard_size="5GB", name=repo_id, pushed=True)
                check_name(repo_id, self._base)
                commit = upload(checkpoint, repo_id, private, token, revision, create_pr, commit_message)
            return {each.name: getattr(commit, each.name) for each in dataclasses.fields(CommitInfo) if each.init}

        commit = CommitInfo(**ranks.from_main(push))
        if isinstance(self.model, PreTrainedModel):
            self._saved_as = repo_id
        return commit


def _check_supported(model: Any) -> None:
    """Raise `ValueError` where a model cannot be pruned here, whatever the request."""
    check_plain(model)
    check_not_consumed(model)
    get_architecture(model.config).pruned_class(model)


def _of_dense_model(plan: PruningPlan, earlier: EarlierPruning | None) -> PruningPlan:
    """Return the plan that does to the dense model what `plan` and the one before it did, where there is one."""
    if earlier is None:
        return plan
    composed = earlier.followed_by(plan)
    if composed is None:
        return plan
    origin = {name: earlier.plan.metadata.get(name) for name in (NAME, FINGERPRINT, REVISION)}
    metadata = composed.metadata | {name: value for name, value in origin.items() if value is not None}
    return dataclasses.replace(composed, metadata=metadata)


def _ignored(_cut: Cut) -> None:
    """For a dense model that is not consumed."""
