"""The teacher of a distillation: it is located and checked before data is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..architectures.wrapping import adapted_module, is_peft_model, model_inside
from ..loading.configs import read_config
from ..loading.integrity import weight_files
from ..loading.models import (
    WHERE,
    adapter_config,
    language_model_class,
    load_causal_lm,
)
from ..loading.offloading import device_map_on_disk
from ..loading.origin import Origin
from ..runs.resume import digest_of
from ..words import is_no_repository
from .distillation import check_kept
from .options import TAUGHT, RecoveryOptions
from .teacher_checks import check_teacher


# Values of a device map that accelerate accepts beside names of devices.
PLANNED_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class TeacherSource:
    """A teacher that was checked, either in memory or not loaded yet.

    Args:
        identity (`str`): the teacher's name in the identity of stored predictions.
        model (`PreTrainedModel`, *optional*): the teacher if it is in memory.
        name (`str`, *optional*): its folder or repository if it is not. Both are `None` where its predictions are
            stored already.
        access (mapping): `token`, `revision`, `trust_remote_code` and the like, for `from_pretrained`.
    """

    identity: str
    model: PreTrainedModel | None = None
    name: str | None = None
    access: Mapping[str, Any] = field(default_factory=dict)

    def load(
        self, student: PreTrainedModel, options: RecoveryOptions, device: torch.device, on_disk: bool = False
    ) -> PreTrainedModel:
        """Return the teacher, loaded in the dtype and on the devices of the options, by default on `device`, or with
        its layers `on_disk`.

        Raises:
            ValueError: where the student cannot learn from it.
            OSError: where it cannot be loaded.
        """
        if self.model is not None:
            return self.model
        device_map: Any = options.teacher_device_map
        if device_map is None and on_disk:
            device_map = self._layers_on_disk(device)
        model = _loaded(self, dtype=options.teacher_dtype, device_map=device_map)
        check_teacher(model, student, options)
        return model if device_map else model.to(device)  # type: ignore[arg-type]

    def _layers_on_disk(self, device: torch.device) -> dict[str, str] | None:
        """Return a device map that leaves the decoder layers in their files; `None` where they are not safetensors."""
        if not weight_files(str(self.name), _where(self)):
            return None
        config = self.config()
        return device_map_on_disk(config, language_model_class(config), device)

    def config(self) -> PreTrainedConfig:
        """Return the config of the teacher, which is in memory or has a name."""
        if self.model is not None:
            return self.model.config
        known = {key: value for key, value in self.access.items() if key in (*WHERE, "trust_remote_code")}
        return read_config(str(self.name), **known)


def find_teacher(
    student: PreTrainedModel, options: RecoveryOptions, teacher: Any, access: Mapping[str, Any] | None = None
) -> TeacherSource | None:
    """Return the teacher of a distillation, checked without reading its weights; `None` in other modes.

    Args:
        student (`PreTrainedModel`): the model that is trained.
        options (`RecoveryOptions`): `mode`, `teacher` and the other options of distillation.
        teacher (`PreTrainedModel`, `PeftModel`, `str`, `Path` or `Origin`, *optional*): the teacher; an `Origin`, the
            model that was pruned, is used only if `options.teacher` is not set.
        access (mapping, *optional*): `token`, `trust_remote_code` and the like, for `from_pretrained`.

    Raises:
        ValueError: where no teacher is named, or two are, or the student cannot learn from it.
        OSError: where the teacher cannot be loaded.
    """
    named = None if isinstance(teacher, Origin) else teacher
    if options.mode not in TAUGHT:
        if named is not None:
            raise ValueError(
                f"A teacher is used with mode='distill' or 'block_distill' only; the mode is {options.mode!r} here."
            )
        return None
    if named is not None and options.teacher is not None and str(named) != options.teacher:
        raise ValueError(
            f"args.teacher is {options.teacher!r}, and recover was called with another teacher; leave one of them out."
        )
    model = None if named is None or isinstance(named, (str, Path)) else _in_memory(named)
    source = _named(options, teacher) if model is None else TeacherSource(_identity(model), model)
    if check_kept(options.teacher_cache, {"teacher": source.identity, "top_k": options.teacher_top_k}):
        return source
    if model is not None:
        check_teacher(model, student, options)
        return source
    if isinstance(teacher, Origin) and options.teacher is None:
        source = _located(source, teacher)
    if not source.name:
        raise ValueError(f"mode={options.mode!r} needs the dense model; name it with teacher=...")
    source = TeacherSource(source.identity, None, source.name, {**(access or {}), **source.access})
    _check_without_weights(source, student, options)
    return source


def _in_memory(teacher: Any) -> PreTrainedModel:
    """Return the transformers model of a teacher in memory; the base model of a `PeftModel` includes its adapters."""
    if is_peft_model(teacher) and hasattr(teacher, "get_base_model"):
        if teacher.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"The teacher, a {type(teacher).__name__}, has learned prompts, which are not supported. Name a model "
                f"without adapters, or one with adapters such as LoRA's."
            )
        teacher = teacher.get_base_model()
    if isinstance(teacher, PreTrainedModel):
        return teacher
    inner = model_inside(teacher)
    hint = f" Pass the model itself, its attribute {inner!r}." if inner is not None else ""
    raise ValueError(
        f"teacher takes a transformers model, a folder or a repository of the Hub; got a {type(teacher).__name__}."
        f"{hint}"
    )


def _identity(model: PreTrainedModel) -> str:
    """Return the identity of a teacher in memory: its name, and a digest of its adapters if it has any."""
    name = str(model.config._name_or_path)
    if adapted_module(model) is None:
        return name
    adapters = (
        (f"{path}.{leaf}", parameter)
        for path, module in model.named_modules()
        if is_peft_model(module)
        for leaf, parameter in module.named_parameters()
        if "base_layer." not in leaf
    )
    return f"{name} with adapters {digest_of(adapters)[:16]}"


def _named(options: RecoveryOptions, teacher: Any) -> TeacherSource:
    """Return a teacher that is not in memory; that of an `Origin` has no name until it is located."""
    if options.teacher is None and isinstance(teacher, Origin):
        return TeacherSource(f"{teacher.name} {teacher.revision or teacher.fingerprint or ''}".rstrip())
    name = options.teacher if isinstance(teacher, Origin) or teacher is None else str(teacher)
    return TeacherSource(name or "", name=name)


def _located(source: TeacherSource, pruned: Origin) -> TeacherSource:
    name = pruned.find()
    # The commit is one of the repository; a folder has none.
    revision = {"revision": pruned.revision} if name == pruned.name and pruned.revision is not None else {}
    return TeacherSource(source.identity, name=name, access=revision)


def _check_without_weights(source: TeacherSource, student: PreTrainedModel, options: RecoveryOptions) -> None:
    """Check a teacher on the meta device, where it has no weights."""
    name = str(source.name)
    _check_device_map(options.teacher_device_map)
    if is_no_repository(name) and not Path(name).is_dir():
        raise OSError(
            f"Cannot load the teacher {name}: there is no such folder. The default is the model that was pruned; "
            f"teacher=... names another one."
        )
    with _naming_the_teacher(source):
        if adapter_config(name, _where(source)) is None:
            config = source.config()
            if getattr(config, "quantization_config", None) is not None:
                # Quantized models cannot be built on the meta device; this teacher is checked when it is loaded.
                return
    with _reported_once():
        check_teacher(_loaded(source, dtype=options.teacher_dtype, device_map="meta"), student, options)


def _check_device_map(device_map: str | None) -> None:
    if device_map in (None, *PLANNED_MAPS):
        return
    try:
        torch.device(str(device_map))
    except RuntimeError as error:
        raise ValueError(
            f"teacher_device_map={device_map!r} is no device; name {', '.join(PLANNED_MAPS)}, or a device such as "
            f"cuda:0."
        ) from error


def _loaded(source: TeacherSource, **placed: Any) -> PreTrainedModel:
    """Load a teacher; raise `ValueError` where its files lack parameters, which would be initialized at random."""
    with _naming_the_teacher(source):
        # With output_loading_info it returns a pair.
        loaded: Any = load_causal_lm(str(source.name), **placed, **source.access, output_loading_info=True)
    model, loading_info = loaded
    if loading_info["missing_keys"]:
        missing = sorted(loading_info["missing_keys"])
        raise ValueError(
            f"The teacher {source.name} lacks {len(missing)} of the parameters of a {type(model).__name__}, such as "
            f"{missing[0]}, which would be initialized at random. Name a checkpoint that was saved with its language "
            f"model head."
        )
    return model


@contextmanager
def _naming_the_teacher(source: TeacherSource) -> Iterator[None]:
    """Add the teacher's name to errors of loading it, and for adapters a hint that their base is needed too."""
    try:
        yield
    except (OSError, ValueError) as error:
        adapters = _adapters_without_base(source)
        raise (OSError if isinstance(error, OSError) else ValueError)(
            f"Cannot load the teacher {source.name}: {adapters}{error} The default is the model that was pruned; "
            f"teacher=... names another one."
        ) from error


def _adapters_without_base(source: TeacherSource) -> str:
    """Return a hint on how to load adapters as the teacher; an empty string where it has none."""
    try:
        values = adapter_config(str(source.name), _where(source))
    except (OSError, ValueError):
        return ""
    if values is None:
        return ""
    base = values.get("base_model_name_or_path") or "an unknown model"
    return (
        f"it holds adapters of {base}, which is needed too. Load them with their base, and pass the model: "
        f"PeftModel.from_pretrained(base, {str(source.name)!r}). "
    )


def _where(source: TeacherSource) -> dict[str, Any]:
    return {name: value for name, value in source.access.items() if name in WHERE}


@contextmanager
def _reported_once() -> Iterator[None]:
    """Silence warnings of a load that is repeated later with the weights; progress bars of downloads are shown."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
