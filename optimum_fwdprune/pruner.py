"""`FwdPruner`: from a dense model to a checkpoint, with no algorithm of its own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version
from transformers.utils import logging

from .allocation import Budget, allocate, removal_budget
from .architectures import Site, SiteKey, find_sites, get_architecture
from .calibration import load_calibration
from .configuration import get_method
from .methods import PruningConfig, ScoringInputs, UnitScores
from .plan import PLAN_NAME, PruningPlan
from .reconstruction import STATISTICS_OF, added_parameters, check_reconstruction, reconstruct
from .report import PruningReport
from .scores import SCORES_NAME, Scores
from .search import check_search, search
from .statistics import collect_statistics
from .surgery import check_resident, prune_model
from .utils import evaluating, folder_moved_into_place
from .verification import logits, masked_logits, probe_batch, relative_difference, rounding_of
from .version import __version__


logger = logging.get_logger(__name__)

# What a safetensors header spends on a tensor, generously, so that a target in bytes holds for the file.
HEADER_BYTES_PER_TENSOR = 192


class FwdPruner:
    """Prunes a causal language model, or any other task head of a supported family, with forward passes only.

    ```python
    pruner = FwdPruner.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    model = pruner.prune(PruningConfig(method="wanda_sp", sparsity=0.3))
    pruner.save_pretrained("smollm2-pruned")
    ```

    Args:
        model (`PreTrainedModel`): a model of a supported family, dense or pruned before.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed to calibrate on text, and saved beside the model.

    Attributes:
        model (`PreTrainedModel`): the dense model, and the pruned one after `prune`.
        plan (`PruningPlan`, *optional*): what `prune` kept.
        report (`PruningReport`, *optional*): what it did.
        scores (`Scores`, *optional*): the last scores, for another budget or to save.
        config (`PruningConfig`, *optional*): the last request.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None):
        get_architecture(model.config).pruned_class(model)
        self.model = model
        self.tokenizer = tokenizer
        self.plan: PruningPlan | None = None
        self.report: PruningReport | None = None
        self.scores: Scores | None = None
        self.config: PruningConfig | None = None

    @classmethod
    def from_pretrained(cls, model_id: str | Path, **kwargs) -> FwdPruner:
        """Load a causal language model and its tokenizer.

        Args:
            model_id (`str` or `Path`): repository of the Hub, or folder.
            kwargs: for `AutoModelForCausalLM.from_pretrained`: `dtype` (the checkpoint's by default), `device_map`,
                `attn_implementation`, `gguf_file`, `revision`, `token`, `trust_remote_code`, ...
        """
        kwargs.setdefault("dtype", "auto")
        shared = {
            name: kwargs[name]
            for name in ("revision", "token", "trust_remote_code", "cache_dir", "subfolder", "local_files_only")
            if name in kwargs
        }
        if "gguf_file" in kwargs:
            # Reading the config of a GGUF file costs as much as reading all of it.
            shared["gguf_file"] = kwargs["gguf_file"]
        else:
            # A family that is not supported fails before gigabytes are read.
            get_architecture(AutoConfig.from_pretrained(model_id, **shared))
        model = AutoModelForCausalLM.from_pretrained(model_id, **kwargs)
        try:
            tokenizer = AutoTokenizer.from_pretrained(model_id, **shared)
        except (OSError, ValueError) as error:
            logger.warning(
                "%s has no tokenizer that loads (%s); calibration can use its own text only.", model_id, error
            )
            tokenizer = None
        return cls(model, tokenizer)

    def score(self, config: PruningConfig | None = None, dataset: Any = None) -> Scores:
        """Score every unit, and gather what the request's reconstruction will need, without changing the model.

        Args:
            config (`PruningConfig`, *optional*): method and calibration.
            dataset (*optional*): calibration text or tokens instead of `config.calibration`; see
                [`~optimum_fwdprune.calibration.load_calibration`].

        Returns:
            `Scores`: to inspect, to save, or to hand to `prune` with other budgets.

        Raises:
            ValueError: on NaN in weights, activations or scores, naming where.
        """
        config = PruningConfig() if config is None else config
        method = get_method(config.method)
        check_resident(self.model)
        sites = find_sites(self.model, config.attention_unit)
        _check_finite(self.model)
        needed = {*method.statistics, *STATISTICS_OF[_reconstruction(config)]}
        with evaluating(self.model):
            calibration = None
            if needed or method.calibrated:
                calibration = load_calibration(config, self.model, self.tokenizer, dataset)
            statistics = {}
            if needed and calibration is not None:
                statistics = collect_statistics(self.model, sites, calibration, config.batch_size, needed)
            found = method.score(
                ScoringInputs(
                    self.model,
                    sites,
                    statistics,
                    calibration,
                    config,
                    lambda values: self._keep(sites, values, config),
                )
            )
        found = found if isinstance(found, UnitScores) else UnitScores(found)
        values = _on_cpu(found.values)
        for site in sites:
            if site.key not in values or values[site.key].shape != (site.num_units,):
                raise ValueError(f"Method {config.method!r} must score {site.num_units} units for the {site}.")
            if not values[site.key].isfinite().all():
                raise ValueError(f"Method {config.method!r} scored NaN or infinity in the {site}.")
        errors, history = _on_cpu(found.standard_errors), dict(found.history)
        self.scores = Scores(config, values, statistics, calibration, errors, found.details, history)
        return self.scores

    def prune(
        self,
        config: PruningConfig | None = None,
        dataset: Any = None,
        *,
        plan: PruningPlan | None = None,
        scores: Scores | None = None,
        inplace: bool = True,
    ) -> PreTrainedModel:
        """Prune the model.

        Args:
            config (`PruningConfig`, *optional*): the request. Without one, 20 % of the prunable parameters go, by
                Wanda-sp with least-squares reconstruction.
            dataset (*optional*): calibration text or tokens instead of `config.calibration`.
            plan (`PruningPlan`, *optional*): replay this plan instead of scoring and allocating; reconstruction
                follows only where the config names it.
            scores (`Scores`, *optional*): allocate by these instead of scoring again. The options of their method are
                those that they were made with, whatever the config says.
            inplace (`bool`, defaults to `True`): consume the dense model. `False` leaves it whole, and needs memory
                for both.

        Returns:
            `PreTrainedModel`: the pruned model, which is `self.model` from then on.

        Raises:
            ValueError: where the request cannot be met, naming the constraint.
            RuntimeError: where the pruned model does not compute what the masked dense model computes.
        """
        if plan is not None and scores is not None:
            raise ValueError("Give a plan to replay or scores to allocate by, not both.")
        config = PruningConfig() if config is None else config
        if plan is None:
            kind = _reconstruction(config)
        else:
            config = dataclasses.replace(config, attention_unit=plan.attention_unit)
            kind = config.reconstruction or "none"
        check_resident(self.model)
        check_reconstruction(self.model, config, kind)
        if plan is None and config.scope == "search":
            check_search(self.model, config)
        sites = find_sites(self.model, config.attention_unit)
        dense = _Sizes.of(self.model)
        seconds: dict[str, float] = {}

        if plan is None:
            with _timed(seconds, "score"):
                scores = self.score(config, dataset) if scores is None else scores
                scores.check_matches(sites, config)
                config = scores.options_into(config)
            with _timed(seconds, "allocate"):
                plan, scores = self._allocate(sites, scores, config, dataset)
        else:
            plan.check_matches(sites, self.model.config.model_type)
        calibration = scores.calibration if scores else None
        with _timed(seconds, "reconstruct"):
            if kind != "none" and calibration is None:
                calibration = load_calibration(config, self.model, self.tokenizer, dataset)
            statistics = scores.statistics if scores else {}
            with evaluating(self.model):
                reconstruction = reconstruct(self.model, sites, plan.kept, kind, config, calibration, statistics)
            projections = reconstruction.projections
            if reconstruction.details:
                plan = dataclasses.replace(plan, metadata={**plan.metadata, "reconstructed": reconstruction.details})
        with _timed(seconds, "verify"):
            probe = probe_batch(self.model, calibration)
            expected = masked_logits(self.model, sites, plan, projections, probe)
            rounding = rounding_of(self.model, sites, plan, projections, probe, expected)
        prunable = sum(site.num_parameters for site in sites)
        removed = sum(len(plan.removed(site.key)) * site.unit_parameters for site in sites)
        with _timed(seconds, "surgery"):
            pruned = prune_model(self.model, sites, plan, projections, inplace)
        with _timed(seconds, "verify"):
            difference = relative_difference(expected, logits(pruned, probe), rounding)

        after = _Sizes.of(pruned)
        self.model, self.plan, self.config, self.scores = pruned, plan, config, scores
        self.report = PruningReport(
            parameters_before=dense.parameters,
            parameters_after=after.parameters,
            bytes_before=dense.bytes,
            bytes_after=after.bytes,
            prunable_parameters=prunable,
            removed_parameters=removed,
            requested_sparsity=plan.metadata.get("requested_sparsity"),
            masked_difference=difference,
            seconds=seconds,
            calibration=calibration.source if calibration else None,
        )
        return pruned

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False, max_shard_size: str = "5GB") -> None:
        """Save the pruned model with its tokenizer, plan, request and scores.

        The folder appears whole or not at all: everything is written to a temporary sibling first.

        Args:
            folder (`str` or `Path`): where to; it must be new or empty.
            overwrite (`bool`, defaults to `False`): replace a folder that is not empty.
            max_shard_size (`str`, defaults to `"5GB"`): largest weight file.

        Raises:
            FileExistsError: where the folder is not empty.
            OSError: where it cannot be written.
            ValueError: before `prune`.
        """
        if self.plan is None or self.config is None:
            raise ValueError("There is nothing to save yet; call prune() first.")
        with folder_moved_into_place(folder, overwrite) as temporary:
            self.model.save_pretrained(temporary, max_shard_size=max_shard_size)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(temporary)
            self.config.save_pretrained(temporary)
            self.plan.save(temporary / PLAN_NAME)
            if self.scores is not None:
                self.scores.save(temporary / SCORES_NAME)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None, **commit_kwargs):
        """Upload what `save_pretrained` writes to a repository of the Hub, creating it where it is missing.

        Args:
            repo_id (`str`): repository id.
            private (`bool`, *optional*): visibility of a new repository.
            token (`str`, *optional*): access token; by default the one that is logged in.
            commit_kwargs: `revision`, `commit_message`, `create_pr` and the like, for `HfApi.upload_folder`.
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "checkpoint")
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_folder(folder_path=Path(folder) / "checkpoint", repo_id=repo_id, **commit_kwargs)

    def _budget(self, sites: list[Site], config: PruningConfig) -> Budget:
        dense = _Sizes.of(self.model)
        losing = (site for site in sites if site.kind in config.kinds)
        added = added_parameters(losing, _reconstruction(config))
        return removal_budget(config, sites, dense.parameters, dense.file_bytes, added)

    def _keep(
        self,
        sites: list[Site],
        values: Mapping[SiteKey, torch.Tensor],
        config: PruningConfig,
        additive: bool | None = None,
    ) -> dict[SiteKey, list[int]]:
        additive = get_method(config.method).is_additive(config) if additive is None else additive
        return allocate(sites, _on_cpu(values), config, self._budget(sites, config), additive)

    def _allocate(
        self, sites: list[Site], scores: Scores, config: PruningConfig, dataset: Any
    ) -> tuple[PruningPlan, Scores]:
        """The plan, and the scores with the history of a search where there was one, and with the tokens it needed."""
        if config.scope != "search":
            return self._plan(sites, scores, self._keep(sites, scores.values, config), config), scores
        calibration = scores.calibration or load_calibration(config, self.model, self.tokenizer, dataset)

        def keep(values: Mapping[SiteKey, torch.Tensor], request: PruningConfig) -> dict[SiteKey, list[int]]:
            return self._keep(sites, values, request, additive=False)

        with evaluating(self.model):
            found = search(self.model, sites, scores.values, config, _reconstruction(config), calibration, keep)
        scores = dataclasses.replace(
            scores,
            calibration=calibration,
            details={**scores.details, "search": found.details},
            history=found.history,
        )
        return self._plan(sites, scores, keep(found.scores, config), config), scores

    def _plan(
        self, sites: list[Site], scores: Scores, kept: dict[SiteKey, list[int]], config: PruningConfig
    ) -> PruningPlan:
        budget = self._budget(sites, config)
        prunable = sum(site.num_parameters for site in sites)
        return PruningPlan(
            kept=kept,
            num_units={site.key: site.num_units for site in sites},
            model_type=self.model.config.model_type,
            attention_unit=config.attention_unit,
            metadata={
                "source": _public_name(self.model.config._name_or_path),
                "method": config.method,
                "reconstruction": _reconstruction(config),
                "requested_sparsity": None if config.has_budget_per_kind else budget.parameters / prunable,
                "scores": {
                    f"{layer}.{site_kind}": {
                        "lowest": float(value.min()),
                        "mean": float(value.mean()),
                        "highest": float(value.max()),
                    }
                    for (layer, site_kind), value in scores.values.items()
                },
                "scoring": scores.details,
                "calibration": scores.calibration
                and {"source": scores.calibration.source, "fingerprint": scores.calibration.fingerprint},
                "seed": config.seed,
                "versions": {
                    "optimum_fwdprune": __version__,
                    "transformers": transformers_version,
                    "torch": torch.__version__,
                },
            },
        )


@dataclasses.dataclass(frozen=True)
class _Sizes:
    parameters: int
    bytes: int
    file_bytes: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Sizes:
        parameters = list(model.parameters())
        total = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        return cls(
            parameters=sum(parameter.numel() for parameter in parameters),
            bytes=total,
            file_bytes=total + HEADER_BYTES_PER_TENSOR * len(parameters),
        )


def _on_cpu(values: Mapping[SiteKey, torch.Tensor]) -> dict[SiteKey, torch.Tensor]:
    return {key: value.detach().float().cpu() for key, value in values.items()}


def _public_name(name_or_path: str) -> str:
    """A Hub repository as it is, a folder by its last part: checkpoints get shared, home directories do not."""
    return Path(name_or_path).name if Path(name_or_path).exists() else name_or_path


def _reconstruction(config: PruningConfig) -> str:
    return config.reconstruction or get_method(config.method).reconstruction


def _check_finite(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        # amax lets NaN and infinity through and, unlike a sum, cannot overflow.
        if not parameter.is_meta and not parameter.detach().abs().amax().isfinite():
            raise ValueError(f"{name} contains NaN or infinity; the checkpoint is damaged or overflowed in its dtype.")


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
