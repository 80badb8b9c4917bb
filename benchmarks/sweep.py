"""What a sweep of five sizes costs beside prunings of the same sizes, in processor time within one run.

    python benchmarks/sweep.py --model FOLDER --text CALIBRATION_TEXT --evaluation TEXT [--presets fast balanced best]

Targets: with `fast`, the sweep without its measuring takes at most 1.3 times the longest pruning; with `balanced` and
`best` it takes at most 0.7 of the five prunings. Calibration tokens are read before, so that neither side counts them.
"""

import argparse
import tempfile
import time

from optimum_fwdprune import FwdPruner, PruningConfig
from optimum_fwdprune.data.load_calibration import load_calibration
from optimum_fwdprune.report import render_table
from optimum_fwdprune.sweep import Measures
from optimum_fwdprune.sweep.measuring import Meter


SIZES = [0.1, 0.2, 0.3, 0.4, 0.5]


class Stopwatch:
    """Sums the processor seconds of the calls of a function."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __get__(self, instance, owner=None):
        def timed(*args, **kwargs):
            start = time.process_time()
            try:
                return self.function(instance, *args, **kwargs)
            finally:
                self.seconds += time.process_time() - start

        return timed


def swept(model, tokenizer, preset, calibration, text, windows):
    """Return the processor seconds of a sweep, and of its measuring."""
    pruner = FwdPruner(model, tokenizer)
    # Everything that measures, the dense model's figures included.
    watches = [Stopwatch(getattr(Meter, name)) for name in ("dense_figures", "measure")]
    Meter.dense_figures, Meter.measure = watches
    measures = Measures({"evaluation": [text]}, max_length=256, speed=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            pruner.sweep(folder, preset, calibration, measures=measures, sparsity=SIZES, **windows)
            total = time.process_time() - start
    finally:
        Meter.dense_figures, Meter.measure = (watch.function for watch in watches)
    return total, sum(watch.seconds for watch in watches)


def separate(model, tokenizer, preset, calibration, windows):
    """Return the processor seconds of a pruning to each size."""
    seconds = []
    for size in SIZES:
        start = time.process_time()
        FwdPruner(model, tokenizer).prune(preset, calibration, sparsity=size, inplace=False, **windows)
        seconds.append(time.process_time() - start)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="File with the calibration text.")
    parser.add_argument("--evaluation", required=True, help="File with the text to measure on.")
    parser.add_argument("--presets", nargs="+", default=["fast", "balanced", "best"])
    parser.add_argument("--windows", type=int, default=128, help="Calibration windows of 256 tokens.")
    parser.add_argument("--dtype", default="bfloat16", help="Such as float32, where a processor has no fast bfloat16.")
    args = parser.parse_args()
    pruner = FwdPruner.from_pretrained(args.model, dtype=args.dtype)
    request = PruningConfig(calibration=args.text, n_samples=args.windows, seq_len=256)
    calibration = load_calibration(request, pruner.model, pruner.tokenizer)
    with open(args.evaluation, encoding="utf-8") as file:
        text = file.read(20_000)
    windows = {"n_samples": args.windows, "seq_len": 256, "batch_size": 8}
    rows = []
    for preset in args.presets:
        alone = separate(pruner.model, pruner.tokenizer, preset, calibration, windows)
        total, measuring = swept(pruner.model, pruner.tokenizer, preset, calibration, text, windows)
        without = total - measuring
        rows.append(
            [
                preset,
                ", ".join(f"{seconds:.0f}" for seconds in alone),
                f"{total:.0f}, of which {measuring:.0f}",
                f"{without / max(alone):.2f}",
                f"{without / sum(alone):.2f}",
            ]
        )
        print(*rows[-1], flush=True)
    header = ["preset", "each alone, s", "sweep, of which measuring, s", "of the longest", "of the sum"]
    print(render_table(header, rows))


if __name__ == "__main__":
    main()
