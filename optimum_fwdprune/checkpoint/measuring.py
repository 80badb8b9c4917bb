"""Measurements of checkpoints that were saved before, written to their records and cards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..evaluation import Comparison
from ..files import check_output_file
from ..loading.base import CARD_NAME
from ..record.record import Record
from ..report.measurements import checked_card, write_measurements


def check_cards(folders: list[str]) -> None:
    """Raise an error where measurements could not be written to a checkpoint, before anything is measured.

    Args:
        folders (`list[str]`): the checkpoints.

    Raises:
        OSError: where a folder cannot be written.
        ValueError: where it is no folder with a pruned checkpoint and its card, the card cannot be read, or a folder
            is named twice.
    """
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ValueError(f"A folder is named twice: {', '.join(folders)}.")
    for folder in map(Path, folders):
        if not (folder / CARD_NAME).is_file() or Record.of_checkpoint(folder).plan is None:
            raise ValueError(
                f"{folder} is no folder with a pruned checkpoint and its model card, which the figures could be "
                f"written to. Leave the cards out, or save the checkpoint with this package first."
            )
        checked_card(folder / CARD_NAME)
        check_output_file(folder / CARD_NAME)


def save_measurements(folder: str | Path, comparison: Comparison) -> None:
    """Write a comparison to the record and the model card of a checkpoint; what else is on the card stays.

    Args:
        folder (`str` or `Path`): the checkpoint, which [`check_cards`] has checked.
        comparison (`Comparison`): measurements, in which the model of the checkpoint is the last one.
    """
    folder, comparison = Path(folder), comparison.without_folders()
    record = Record.of_checkpoint(folder)
    write_measurements(folder / CARD_NAME, comparison, record.comparison)
    replace(record, comparison=comparison).save_figures(folder)
