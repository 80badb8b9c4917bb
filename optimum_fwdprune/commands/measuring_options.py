"""Options of the commands that measure quality and speed."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Callable, Sequence
from typing import Any


def add_evaluation_options(parser: ArgumentParser) -> None:
    """Add the options of quality measurements."""
    quality = parser.add_argument_group("quality")
    add_text_options(quality, " Of chats, the answers are measured.")
    quality.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="Tokens between the starts of two windows. Default: --max_length, so that windows do not overlap.",
    )
    quality.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        help="Tasks of lm-evaluation-harness: names of tasks, zero-shot (the set that papers on pruning report), or "
        "folders of task YAML files.",
    )
    quality.add_argument(
        "--num_fewshot", type=int, metavar="N", help="Examples in the prompt. Default: the task's own number."
    )
    quality.add_argument("--limit", type=int, metavar="N", help="Rows of each task to evaluate. Default: all.")
    quality.add_argument(
        "--apply_chat_template", action="store_true", help="Put the prompts of tasks through the chat template."
    )
    quality.add_argument(
        "--batch_size",
        type=int,
        metavar="N",
        default=4,
        help="Windows, or requests of tasks, per forward pass (default: 4).",
    )


def add_text_options(group: _ArgumentGroup, more: str = "") -> None:
    """Add the options that name texts to measure on; `more` is added to the help."""
    group.add_argument(
        "--text",
        nargs="+",
        default=[],
        help=f"Texts to measure perplexity on: .txt, .json, .jsonl or .parquet files, wikitext2, builtin (Python's "
        f"documentation), or datasets of the Hub.{more}",
    )
    group.add_argument("--text_split", default="test", help="Split of Hub datasets (default: test).")
    group.add_argument("--text_config", help="Configuration name of Hub datasets.")
    group.add_argument("--text_column", help="Text column. Default: text, or the only string column.")
    group.add_argument(
        "--max_length",
        type=int,
        metavar="N",
        help="Tokens per window. Default: 512, or the model's number of positions if that is smaller.",
    )


def read_texts(args: Namespace) -> dict[str, list[str]]:
    """Return the texts that the options name, by their names."""
    from optimum_fwdprune.data.texts import open_texts

    return {name: list(pieces) for name, pieces in _opened(args, open_texts).items()}


def read_texts_or_chats(args: Namespace) -> dict[str, Any]:
    """Return the texts and chats that the options name, by their names."""
    from optimum_fwdprune.evaluation.chats import open_texts_or_chats

    return _opened(args, open_texts_or_chats)


def _opened(args: Namespace, open_source: Callable[..., tuple[str, Any]]) -> dict[str, Any]:
    """Return what a function opens of the sources that the options name, by their names."""
    opened = [open_source(source, args.text_config, args.text_split, args.text_column) for source in args.text]
    short = [name for name, _ in opened]
    # Two files of the same name in different folders are told apart by their paths.
    labels = [source if short.count(name) > 1 else name for source, name in zip(args.text, short)]
    check_different(labels, "--text")
    return {label: pieces for label, (_, pieces) in zip(labels, opened)}


def evaluation_options(args: Namespace) -> dict[str, Any]:
    """Return the options of quality measurements, with the texts read, for `evaluate` and `compare`."""
    names = ("tasks", "max_length", "stride", "batch_size", "num_fewshot", "limit", "apply_chat_template")
    return {"texts": read_texts_or_chats(args)} | {name: getattr(args, name) for name in names}


def check_different(names: Sequence[str], where: str) -> None:
    """Raise `ValueError` where a name occurs twice; `where` is the subject of the message."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where} names {name} twice.")


def add_speed_options(parser: ArgumentParser) -> None:
    """Add the options of speed measurements."""
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--batch_sizes",
        type=int,
        metavar="N",
        nargs="+",
        default=[1],
        help="Numbers of prompts per batch; every one is timed (default: 1).",
    )
    speed.add_argument(
        "--prompt_tokens",
        type=int,
        metavar="N",
        nargs="+",
        default=[512],
        help="Lengths of the prompt in tokens; every one is timed (default: 512).",
    )
    speed.add_argument(
        "--new_tokens", type=int, metavar="N", default=16, help="Decoding steps after each prefill (default: 16)."
    )
    speed.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        default=5,
        help="Timed runs, whose median is reported (default: 5). With 0 nothing is timed.",
    )


def speed_options(args: Namespace) -> dict[str, Any]:
    """Return the options of speed measurements, for `benchmark` and `compare`."""
    from optimum_fwdprune.evaluation.measuring import SPEED_OPTIONS

    return {name: getattr(args, name) for name in SPEED_OPTIONS}
