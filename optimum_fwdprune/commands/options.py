"""Options that several commands share, and the models, tokenizers, uploads and measurements that they describe."""

from __future__ import annotations

import dataclasses
import typing
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace, _ArgumentGroup
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from optimum_fwdprune.request.budget_options import COUNTS, SIZES
from optimum_fwdprune.request.fields import AUTO, field_type, may_be_auto

from .parser import choice, number_or_auto


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    from optimum_fwdprune.pruner import FwdPruner

# The options of `from_pretrained`, with their help.
LOADING = {
    "gguf_file": "GGUF file inside MODEL to load.",
    "dtype": "Dtype of the weights, such as bfloat16. Default: the checkpoint's own.",
    "device_map": "Device of the layers, such as auto, cuda or cpu. Default: the CPU; under accelerate launch and "
    "with --low_memory the accelerator, if there is one.",
    "attn_implementation": "Implementation of attention: eager, sdpa, flash_attention_2, ...",
    "revision": "Branch, tag or commit of a Hub repository.",
    "token": "Access token of the Hub. Default: the token of the user who is logged in.",
}


def add_loading_options(parser: ArgumentParser) -> None:
    """Add the options of `from_pretrained`."""
    loading = parser.add_argument_group("loading")
    for name, text in LOADING.items():
        loading.add_argument(f"--{name}", help=text)
    loading.add_argument("--trust_remote_code", action="store_true", help="Run the repository's own modelling code.")


def loading_options(args: Namespace) -> dict[str, Any]:
    """Return the loading options that were set, as arguments of `from_pretrained`."""
    options = {name: getattr(args, name) for name in LOADING if getattr(args, name) is not None}
    return options | {"trust_remote_code": args.trust_remote_code}


@contextmanager
def naming_the_model(model: str) -> Iterator[None]:
    """Add the model's name to errors of loading it, which some messages of transformers leave out."""
    try:
        yield
    except (OSError, ValueError) as error:
        if str(error).startswith("Cannot load "):
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"Cannot load {model}: {error}") from error


def load_model(model: str, args: Namespace) -> PreTrainedModel:
    """Load a causal language model, in its own dtype unless the options name one."""
    from optimum_fwdprune.loading.models import load_causal_lm
    from optimum_fwdprune.loading.placement import placed

    with naming_the_model(model):
        return load_causal_lm(model, **placed({"dtype": "auto"} | loading_options(args)))


def add_tokenizer_option(parser: ArgumentParser) -> None:
    """Add the option that replaces the model's own tokenizer."""
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="Folder or Hub repository of the tokenizer. Default: the model's own."
    )


def load_tokenizer(model: str, args: Namespace) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `--tokenizer` names, or else the model's own."""
    from optimum_fwdprune.loading.models import check_is_there
    from optimum_fwdprune.loading.tokenizers import load_tokenizer, named_tokenizer

    options = loading_options(args)
    access = {name: options[name] for name in ("token", "trust_remote_code") if name in options}
    if args.tokenizer is not None:
        return named_tokenizer(args.tokenizer, **access)
    version = {name: options[name] for name in ("gguf_file", "revision") if name in options}
    tokenizer = load_tokenizer(model, **access, **version)
    if tokenizer is None:
        # Where the model itself is missing, the error names that.
        check_is_there(model, **access, **version)
        raise ValueError(f"{model} has no tokenizer; name one with --tokenizer.")
    return tokenizer


def load_processor(model: str, args: Namespace) -> PreTrainedTokenizerBase | ProcessorMixin:
    """Load the processor of a multimodal model. Models without one, and models whose tokenizer `--tokenizer` replaces,
    have their tokenizer alone."""
    from optimum_fwdprune.loading.tokenizers import load_processor

    processor = None
    if args.tokenizer is None:
        options = loading_options(args)
        names = ("token", "trust_remote_code", "revision")
        processor = load_processor(model, **{name: options[name] for name in names if name in options})
    return processor or load_tokenizer(model, args)


def add_hub_options(parser: ArgumentParser) -> None:
    """Add the options of an upload to the Hub."""
    hub = parser.add_argument_group("hub")
    hub.add_argument(
        "--push-to-hub", "--push_to_hub", metavar="REPO", help="Also upload the checkpoint to this repository."
    )
    hub.add_argument("--private", action="store_true", default=None, help="Make a new repository private.")
    where = hub.add_mutually_exclusive_group()
    where.add_argument("--push-revision", "--push_revision", metavar="BRANCH", help="Branch to upload to.")
    where.add_argument("--create-pr", "--create_pr", action="store_true", help="Open a pull request instead.")


def check_hub_options(args: Namespace) -> None:
    """Raise an error where the upload that the options ask for is known to be impossible, before any work is done."""
    if args.push_to_hub is not None:
        from optimum_fwdprune.checkpoint.hub import check_upload

        check_upload(args.push_to_hub, args.token)


def push_to_hub(pruner: FwdPruner, args: Namespace) -> None:
    """Upload the checkpoint that was saved, where the options ask for it.

    Raises:
        OSError: where the upload fails; the message names the folder, which is complete, and how to try again.
    """
    repo_id = args.push_to_hub
    if repo_id is None:
        return
    options = {"private": args.private, "token": args.token, "revision": args.push_revision}
    try:
        commit = pruner.push_to_hub(repo_id, create_pr=args.create_pr, **options)
    except OSError as error:
        raise OSError(
            f"{error} The checkpoint in {args.output} is complete: `hf upload {repo_id} {args.output}` tries again."
        ) from error
    print(f"Uploaded to {commit.pr_url or repo_id}.")


def add_output_folder(parser: ArgumentParser, kind: str) -> None:
    """Add the folder that a checkpoint is written to; the help calls it a `kind` checkpoint."""
    parser.add_argument("output", help=f"Folder to write the {kind} checkpoint to, new or empty.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an output folder that is not empty.")


def _type_of(name: str, hint: Any, kind: type) -> dict[str, Any]:
    """Return the arguments of `add_argument` for the type of an option.

    The request reads sizes and large numbers, which may have units.
    """
    if name in SIZES:
        return {"type": str, "metavar": "SIZE"}
    if name in COUNTS:
        return {"type": str, "metavar": "N"}
    if may_be_auto(hint):
        return {"type": number_or_auto, "metavar": f"{{{AUTO},N}}"}
    return {"type": kind, "metavar": kind.__name__.upper()}


def add_config_options(
    parser: ArgumentParser,
    config_class: type,
    known: set[str],
    heading_of: Callable[[dataclasses.Field], str],
    groups: dict[str, _ArgumentGroup],
    several: Collection[str] = (),
) -> set[str]:
    """Add an option for every field of a config dataclass that is not `known` yet, and return the names added.

    Options that the user leaves out are absent from the namespace, so that the config's own defaults hold.

    Args:
        parser (`ArgumentParser`): the parser that gets the options.
        config_class (`type`): the dataclass.
        known (`set[str]`): names that are options already.
        heading_of (`Callable`): returns the heading of the help that a field belongs under.
        groups (`dict[str, _ArgumentGroup]`): groups by heading; new ones are added to it.
        several (collection of `str`, *optional*): fields whose options take several values.
    """
    hints = typing.get_type_hints(config_class)
    added = set()
    for field in dataclasses.fields(config_class):
        if field.name in known:
            continue
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        text = field.metadata.get("help", "")
        if default not in (None, []):
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            text += f" (default: {shown})"
        kind, is_list, _ = field_type(hints[field.name])
        if kind is bool:
            options: dict[str, Any] = {"action": BooleanOptionalAction}
        else:
            # Where the default is computed, an empty list is another value than the default.
            many = "*" if default is None else "+"
            choices = field.metadata.get("choices")
            options = choice(choices) if choices else _type_of(field.name, hints[field.name], kind)
            options["nargs"] = "+" if field.name in several else many if is_list else None
        title = heading_of(field)
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(f"--{field.name}", default=SUPPRESS, help=text.replace("%", "%%"), **options)
        added.add(field.name)
    return added
