"""Measurements of models, dense or pruned: quality, speed and size."""

from pathlib import Path

from .chats import chats_loss
from .comparison import Comparison, Evaluation
from .measuring import QualityOptions, compare, evaluate
from .memory import PeakMemory
from .perplexity import TextLoss, perplexity, text_loss, texts_loss, window_losses
from .speed import Benchmark, Spread, Timing, benchmark, slower_because
from .tasks import TASK_PRESETS, TaskScore, evaluate_tasks


# The path to pass to `evaluate.load`.
PERPLEXITY_METRIC = str(Path(__file__).with_name("perplexity_metric.py"))

__all__ = [
    "PERPLEXITY_METRIC",
    "TASK_PRESETS",
    "Benchmark",
    "Comparison",
    "Evaluation",
    "PeakMemory",
    "QualityOptions",
    "Spread",
    "TaskScore",
    "TextLoss",
    "Timing",
    "benchmark",
    "chats_loss",
    "compare",
    "evaluate",
    "evaluate_tasks",
    "perplexity",
    "slower_because",
    "text_loss",
    "texts_loss",
    "window_losses",
]
