"""Scores with all that went into them, so that another budget costs no second scoring."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..architectures import Site, SiteKey, get_architecture
from ..data.calibration import Calibration
from ..files import (
    as_path,
    check_output_file,
    load_tensors,
    save_tensors_atomically,
)
from ..forward.gathering import gather_statistics
from ..forward.statistics import PlacedStatistics, SiteStatistics
from ..loading.offloading import InTurn, is_offloaded
from ..reconstruction.independent import Grams, grams_fit, statistics_with_grams
from ..reconstruction.kinds import BIAS, INDEPENDENT, LEAST_SQUARES, STATISTICS_OF
from ..request.choices import SEARCH
from ..request.config import CALIBRATION
from ..runs.loggers import get_logger
from ..runs.resume import Checkpoint, State
from ..words import html_table
from .methods import (
    PruningConfig,
    ScoringInputs,
    UnitScores,
    get_method,
)


logger = get_logger(__name__)

# In a folder of its own: servers such as vLLM read every .safetensors beside a config as weights.
SCORES_NAME = "fwdprune/scores.safetensors"


def needs_calibration(config: PruningConfig) -> bool:
    """Whether the request's scores, or its reconstruction, need calibration tokens."""
    return bool(_needed(config)) or get_method(config.method).calibrated


def runs_tokens(config: PruningConfig, scores: Scores) -> bool:
    """Whether a request whose units are scored already passes calibration tokens through the model again."""
    if config.resolved_scope == SEARCH or config.reconstruction == LEAST_SQUARES:
        return True
    return config.reconstruction == BIAS and not scores.statistics


def check_scoring(model: PreTrainedModel, config: PruningConfig) -> None:
    """Raise `ValueError` where `model` does not allow the scores that the request asks for, before anything runs."""
    if is_offloaded(model) and get_method(config.method).differentiates(config):
        raise ValueError(
            f"method={config.method!r} back-propagates here, which cannot reach offloaded weights. Load the model "
            f"without offloading, or use method='mini_llm' with gradient='zeroth_order', which runs forward passes."
        )


def score_units(
    model: PreTrainedModel,
    sites: list[Site],
    config: PruningConfig,
    calibration: Calibration | None,
    keep: Callable[[Mapping[SiteKey, torch.Tensor]], dict[SiteKey, list[int]]],
    checkpoint: Checkpoint | None = None,
) -> Scores:
    """Score every unit, and gather what the request's reconstruction will need, without changing the model.

    Args:
        model (`PreTrainedModel`): the dense model, in eval mode.
        sites (`list[Site]`): all its sites.
        config (`PruningConfig`): the request.
        calibration (`Calibration`, *optional*): the tokens, where the request `needs_calibration`.
        keep (`Callable`): scores of every unit in, out what the request would keep under them.
        checkpoint (`Checkpoint`, *optional*): where long stages keep their state.

    Raises:
        ValueError: on NaN in weights, activations or scores, naming where.
    """
    _check_finite(model)
    checkpoint = checkpoint or Checkpoint()
    method, needed = get_method(config.method), _needed(config)
    statistics: dict[SiteKey, SiteStatistics] = {}
    grams: Grams = {}
    if needed and calibration is not None and _will_refit_independently(config) and grams_fit(sites):
        statistics, grams = statistics_with_grams(model, sites, calibration, config.batch_size, needed, checkpoint)
    elif needed and calibration is not None:
        (statistics,) = gather_statistics(model, sites, [calibration], config.batch_size, needed, checkpoint)
    # Scored again on another device, units that are worth the same could change places.
    stage = checkpoint.stage("scores", calibration)
    found = stage.load(_scores_of)
    if found is None:
        placed = PlacedStatistics(sites, statistics)

        def keep_in_memory(scores: Mapping[SiteKey, torch.Tensor]) -> dict[SiteKey, list[int]]:
            return keep({key: values.cpu() for key, values in scores.items()})

        inputs = ScoringInputs(model, InTurn(sites), placed, calibration, config, keep_in_memory, checkpoint)
        found = _in_memory(method.score(inputs))
        _check_scores(found, sites, config)
        stage.save(lambda: _state_of(found))
    errors, history = dict(found.standard_errors), dict(found.history)
    about = (errors, found.details, history, grams)
    family = get_architecture(model.config).model_type
    return Scores(config, dict(found.values), statistics, calibration, *about, model_type=family)


def _in_memory(found: UnitScores | Mapping[SiteKey, torch.Tensor]) -> UnitScores:
    found = found if isinstance(found, UnitScores) else UnitScores(found)
    values, errors = (
        {key: value.detach().float().cpu() for key, value in values.items()}
        for values in (found.values, found.standard_errors)
    )
    return replace(found, values=values, standard_errors=errors)


def _check_scores(found: UnitScores, sites: Iterable[Site], config: PruningConfig) -> None:
    values = found.values
    for site in sites:
        if site.key not in values or values[site.key].shape != (site.num_units,):
            raise ValueError(f"Method {config.method!r} must score {site.num_units} units for the {site}.")
        if not values[site.key].isfinite().all():
            raise ValueError(f"Method {config.method!r} scored NaN or infinity in the {site}.")


def _state_of(found: UnitScores) -> State:
    tensors = {f"scores.{layer}.{kind}": value for (layer, kind), value in found.values.items()}
    tensors |= {f"errors.{layer}.{kind}": value for (layer, kind), value in found.standard_errors.items()}
    tensors |= {f"history.{name}": values for name, values in found.history.items()}
    return tensors, {"details": found.details}


def _scores_of(tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> UnitScores:
    def of_sites(group: str) -> dict[SiteKey, torch.Tensor]:
        names = (name.split(".") for name in tensors if name.startswith(f"{group}."))
        return {(int(layer), kind): tensors[f"{group}.{layer}.{kind}"] for _, layer, kind in names}

    history = {
        name.removeprefix("history."): values for name, values in tensors.items() if name.startswith("history.")
    }
    return UnitScores(of_sites("scores"), of_sites("errors"), numbers["details"], history)


def _will_refit_independently(config: PruningConfig) -> bool:
    return config.reconstruction == LEAST_SQUARES and config.reconstruction_order == INDEPENDENT


def _needed(config: PruningConfig) -> set[str]:
    return {*get_method(config.method).statistics, *STATISTICS_OF[config.reconstruction]}


def _check_finite(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        # amax lets NaN and infinity through and, unlike a sum, cannot overflow.
        if not parameter.is_meta and not parameter.detach().abs().amax().isfinite():
            raise ValueError(f"{name} contains NaN or infinity; the checkpoint is damaged or overflowed in its dtype.")


@dataclass
class Scores:
    """Scores of every unit, and the statistics and tokens behind them.

    Args:
        config (`PruningConfig`): the request they were made for; its method and attention unit bind them.
        values (`dict[tuple[int, str], Tensor[num_units]]`): higher is kept.
        statistics (`dict[tuple[int, str], SiteStatistics]`): empty where neither method nor reconstruction needs any.
        calibration (`Calibration`, *optional*): the tokens.
        standard_errors (`dict[tuple[int, str], Tensor[num_units]]`): of scores that were estimated; else empty.
        details (`dict`): how the scores came about, as JSON values.
        history (`dict[str, Tensor]`): what happened step by step, of methods that learn.
        grams (`Grams`): for independent least squares, where they came along with the statistics; they are not saved.
        calibrated_on (`dict[str, str]`): `source` and `fingerprint` of the tokens, also where the tokens themselves
            were not saved; empty where there were none.
        model_type (`str`, *optional*): family of the model; `None` in files of earlier versions.
    """

    config: PruningConfig
    values: dict[SiteKey, torch.Tensor]
    statistics: dict[SiteKey, SiteStatistics]
    calibration: Calibration | None
    standard_errors: dict[SiteKey, torch.Tensor] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    history: dict[str, torch.Tensor] = field(default_factory=dict)
    grams: Grams = field(default_factory=dict, repr=False)
    calibrated_on: dict[str, str] = field(default_factory=dict)
    model_type: str | None = None

    def __post_init__(self):
        if self.calibration is not None and not self.calibrated_on:
            self.calibrated_on = {
                "source": self.calibration.source,
                "fingerprint": self.calibration.fingerprint,
            }

    def calibrated_with(self, calibration: Calibration) -> Scores:
        """Return the same scores with tokens, for what runs them again; a warning where they are other tokens than
        those that the scores were made on."""
        of_scores = self.calibrated_on.get("fingerprint")
        if of_scores is not None and of_scores != calibration.fingerprint:
            logger.warning(
                "The scores were made on other calibration tokens (%s, %s) than those that this request reads (%s, "
                "%s). Checkpoints keep no tokens: pass the same data as dataset, or scores that Scores.save wrote.",
                self.calibrated_on.get("source"),
                of_scores,
                calibration.source,
                calibration.fingerprint,
            )
        return replace(self, calibration=calibration)

    def _repr_html_(self) -> str:
        header = ("layer", "kind", "units", "lowest score", "mean", "highest")
        rows = [
            (
                str(layer),
                kind,
                str(len(value)),
                *(f"{number:.3g}" for number in (value.min(), value.mean(), value.max())),
            )
            for (layer, kind), value in sorted(self.values.items())
        ]
        return html_table(header, rows)

    def check_matches(self, sites: Iterable[Site], config: PruningConfig, model_type: str) -> None:
        """Raise `ValueError` where the scores belong to another method, attention unit, family or model."""
        if self.model_type not in (None, model_type):
            raise ValueError(
                f"These scores were made for a {self.model_type!r} model, and this one is {model_type!r}. Leave "
                f"scores out to score this model."
            )
        for name in ("method", "attention_unit"):
            made_for, asked = getattr(self.config, name), getattr(config, name)
            if made_for != asked:
                raise ValueError(f"These scores were made with {name}={made_for!r}, the request says {asked!r}.")
        sites = list(sites)
        if self.values.keys() != {site.key for site in sites}:
            raise ValueError(
                f"These scores were made for another model: they have {len(self.values)} sites, and this model has "
                f"{len(sites)}."
            )
        for site in sites:
            if len(self.values[site.key]) != site.num_units:
                raise ValueError(f"These scores were made for another model: they do not fit the {site}.")

    def reads_anew(self, config: PruningConfig) -> bool:
        """Whether a request that reuses these scores reads calibration tokens of its own."""
        return self.calibration is None and (config.rounds > 1 or runs_tokens(config, self))

    def options_into(self, config: PruningConfig, named: Collection[str] = ()) -> PruningConfig:
        """Return `config` with what these scores were made with: the options of their method, the seed and, unless the
        request reads tokens of its own, the calibration. A warning names what was asked for otherwise.

        Args:
            config (`PruningConfig`): the request.
            named (collection of `str`): options that were passed by name, which are asked for even where they are the
                defaults; of others the defaults are taken for not asked for.
        """
        made_with = {name: getattr(self.config, name) for name in self._options(config)}
        defaults = type(config)()
        other = [
            name
            for name, value in made_with.items()
            if (name in named or getattr(config, name) != getattr(defaults, name))
            and config.to_dict()[name] != self.config.to_dict()[name]
        ]
        if other:
            logger.warning(
                "The scores were made with %s, which holds for this request too, and not %s. Leave out scores to "
                "score anew.",
                ", ".join(f"{name}={made_with[name]!r}" for name in other),
                ", ".join(f"{name}={getattr(config, name)!r}" for name in other),
            )
        return replace(config, **made_with)

    def _options(self, config: PruningConfig) -> list[str]:
        """The options of a request that these scores decide."""
        shared = {declared.name: declared for declared in fields(PruningConfig)}
        decided = [declared.name for declared in fields(self.config) if declared.name not in shared]
        if self.reads_anew(config):
            return [*decided, "seed"]
        # How many windows pass at a time changes no score.
        of_tokens = [name for name, declared in shared.items() if declared.metadata.get("group") == CALIBRATION]
        return [*decided, *(name for name in of_tokens if name != "batch_size")]

    def check_dataset(self, calibration: Calibration) -> None:
        """Warn where data that was passed with these scores is not what they were made on, and is not read."""
        if self.calibrated_on.get("fingerprint") not in (None, calibration.fingerprint):
            logger.warning(
                "The scores bring the calibration tokens that they were made on (%s), and dataset (%s), which holds "
                "others, is not used. Leave out scores to score anew.",
                self.calibrated_on.get("source"),
                calibration.source,
            )

    def save(self, path: str | Path, tokens: bool = True) -> None:
        """Write everything to one safetensors file.

        Args:
            path (`str` or `Path`): the file.
            tokens (`bool`, defaults to `True`): include the calibration tokens. Whoever has the tokenizer can read
                them, so checkpoints have their fingerprint alone.
        """
        tensors = {}
        for (layer, kind), value in self.values.items():
            tensors[f"scores.{layer}.{kind}"] = value
        for (layer, kind), statistics in self.statistics.items():
            tensors[f"mean.{layer}.{kind}"] = statistics.mean
            tensors[f"variance.{layer}.{kind}"] = statistics.variance
        for (layer, kind), error in self.standard_errors.items():
            tensors[f"standard_error.{layer}.{kind}"] = error
        tensors |= {f"history.{name}": values for name, values in self.history.items()}
        metadata: dict[str, Any] = {"config": self.config.to_dict(), "details": self.details}
        if self.model_type is not None:
            metadata["model_type"] = self.model_type
        if self.statistics:
            metadata["count"] = next(iter(self.statistics.values())).count
        if self.calibrated_on:
            metadata["calibrated_on"] = self.calibrated_on
        if self.calibration is not None and tokens:
            tensors["input_ids"] = self.calibration.input_ids
            if self.calibration.attention_mask is not None:
                tensors["attention_mask"] = self.calibration.attention_mask
        path = check_output_file(as_path(path, "path"))
        save_tensors_atomically(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read scores from a file, or from the checkpoint folder that holds them.

        Raises:
            ValueError: where the file holds no scores.
        """
        path = as_path(path, "path")
        path = path / SCORES_NAME if path.is_dir() else path
        groups: dict[str, dict[SiteKey, torch.Tensor]] = {
            name: {} for name in ("scores", "mean", "variance", "standard_error")
        }
        tokens, history = {}, {}
        try:
            tensors, metadata = load_tensors(path)
            for name, tensor in tensors.items():
                group, _, site = name.partition(".")
                if group in groups:
                    layer, _, kind = site.partition(".")
                    groups[group][(int(layer), kind)] = tensor
                elif group == "history":
                    history[site] = tensor
                else:
                    tokens[name] = tensor
            config = PruningConfig.from_dict(metadata["config"])
            statistics = {
                key: SiteStatistics(metadata["count"], mean, groups["variance"][key])
                for key, mean in groups["mean"].items()
            }
            # Earlier versions kept the source alone.
            calibrated_on = metadata.get("calibrated_on", {})
            calibration = (
                Calibration(
                    tokens["input_ids"],
                    tokens.get("attention_mask"),
                    calibrated_on.get("source") or metadata["source"],
                )
                if "input_ids" in tokens
                else None
            )
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{path} holds no scores: {type(error).__name__}: {error}.") from error
        errors, details = groups["standard_error"], metadata.get("details", {})
        return cls(
            config,
            groups["scores"],
            statistics,
            calibration,
            errors,
            details,
            history,
            calibrated_on=calibrated_on,
            model_type=metadata.get("model_type"),
        )
