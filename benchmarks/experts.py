"""Which experts a mixture can lose: REAP, frequency, magnitude and random, as cut and with least squares.

    python benchmarks/experts.py CALIBRATION_FILE EVALUATION_FILE [--seeds 0 1 2] [--rows TEXT ...] [--table]
    python benchmarks/experts.py --stack 4 [--folder DISK]

Small mixtures of Qwen3-MoE's shape (8 experts in each of 4 layers, of which a token uses 2) are trained on the first
part of the calibration file, one per seed, in a few minutes each. They lose 25 and 50 % of their experts. Calibration
windows come from the rest of this file, and losses are measured on windows of the evaluation file. A seed determines
the training, the calibration windows and the random choice. Every row is a line of `--results`, and a run that was
stopped goes on with the rows that are missing. The trained mixtures are kept beside it.

With `--stack`, a checkpoint with that many layers of Qwen3-30B-A3B's shape and random bfloat16 weights (1.2 GB each)
is written to a temporary folder, and loses half of its experts with `low_memory=True` in a process of its own. The
seconds, the peak memory, and how often the calibration tokens ran through the experts are printed.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from pathlib import Path

import torch
from expert_stack import measure_stack, prune_stack
from small_mixture import counting_losses, misrouted, trained_mixture, used_experts
from study import difference, digest_of, finished_rows, table

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.evaluation import window_losses
from optimum_fwdprune.files import write_text_atomically


METHODS, SPARSITIES = ("reap", "expert_frequency", "magnitude", "random"), (0.25, 0.5)
REPAIRS = ("none", "least_squares")
DENSE, RANDOM = "dense", "random"
WINDOW = 256
# The part of the calibration file that the mixtures are trained on.
TRAINED_ON = 0.8


class Experts:
    """The rows of one seed.

    Args:
        seed (`int`): the seed.
        options (`Namespace`): options of the command line.
    """

    def __init__(self, seed, options):
        text = Path(options.calibration).read_text(encoding="utf-8")
        end = text.rindex("\n", 0, int(len(text) * TRAINED_ON)) + 1
        self.training, self.calibration = text[:end], text[end:]
        self.evaluation = Path(options.evaluation).read_text(encoding="utf-8")
        self.seed, self.options = seed, options
        self.settings = {
            "epochs": options.epochs,
            "windows": options.windows,
            "n_samples": options.n_samples,
            "texts": digest_of(text, self.evaluation),
        }
        self._dense = self._windows = None

    def rows(self):
        """Return the names of the rows: the seed, and the sparsity, method and repair, or the dense model."""
        cut = itertools.product(SPARSITIES, METHODS, REPAIRS)
        names = (f"{sparsity:g}/{method}/{repair}" for sparsity, method, repair in cut)
        return [f"{self.seed}/{name}" for name in (DENSE, *names)]

    def measure(self, name):
        """Return the figures of a row."""
        if name.endswith(DENSE):
            return self._references() | {"losses": self._losses(self.dense.model)}
        _, sparsity, method, repair = name.split("/")
        pruner = FwdPruner(self.dense.model, self.dense.tokenizer)
        model = pruner.prune(
            None,
            [self.calibration],
            kinds=["expert"],
            method=method,
            sparsity=float(sparsity),
            reconstruction=repair,
            seed=self.seed,
            n_samples=self.options.n_samples,
            seq_len=WINDOW,
            inplace=False,
        )
        kept = {str(key): units for key, units in pruner.plan.kept.items() if key.kind == "expert"}
        return {"losses": self._losses(model), "kept": kept, "routing": pruner.plan.metadata.get("routing")}

    @property
    def dense(self):
        """The pruner of the trained mixture."""
        if self._dense is None:
            folder = trained_mixture(self.training, self.options.epochs, self.seed, self.options.results.parent)
            self._dense = FwdPruner.from_pretrained(folder)
            self._dense.model.eval()
            ids = self._ids(self.evaluation)
            windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
            places = torch.linspace(0, len(windows) - 1, min(self.options.windows, len(windows))).round().long()
            self._windows = windows[places]
        return self._dense

    def _references(self):
        """Return figures that show whether the mixture has learned, and whether its experts differ."""
        model, windows = self.dense.model, self._windows
        counted = counting_losses(self._ids(self.training), windows, model.config.vocab_size)
        summary = json.loads((Path(model.name_or_path) / "training.json").read_text(encoding="utf-8"))
        return {
            **{name: losses.tolist() for name, losses in counted.items()},
            "misrouted": self._losses(misrouted(model)),
            "used": used_experts(model, windows[:32]).tolist(),
            "training": {key: summary[key] for key in ("tokens", "losses", "seconds")},
        }

    def _ids(self, text):
        return torch.tensor(self.dense.tokenizer(text, verbose=False)["input_ids"])

    def _losses(self, model):
        return window_losses(model, self._windows, batch_size=16).tolist()


def printed(rows, seeds):
    """Return the tables of the finished rows."""
    losses = {name: torch.tensor(row["losses"], dtype=torch.float64) for name, row in rows.items()}
    seeds = [seed for seed in seeds if f"{seed}/{DENSE}" in rows]
    return "\n".join([_trained(rows, seeds), _compared(losses, seeds)])


def _trained(rows, seeds):
    """Return the table of the dense mixtures beside their references."""
    body = []
    for seed in seeds:
        row = rows[f"{seed}/{DENSE}"]
        names = ("unigram", "bigram", "losses", "misrouted")
        used = torch.tensor(row["used"])
        shares = f"{float(used.min()):.0%} to {float(used.max()):.0%}"
        figures = (f"{_perplexity(torch.tensor(row[name], dtype=torch.float64)):.1f}" for name in names)
        body.append([seed, *figures, shares, f"{row['training']['seconds']:.0f}"])
    header = ["seed", "unigram", "bigram", "mixture", "wrong experts", "tokens of an expert", "training, s"]
    return table(header, body)


def _compared(losses, seeds):
    """Return the table of what is left after pruning, with the paired differences from random experts."""
    body = []
    for sparsity in SPARSITIES:
        for method in METHODS:
            for repair in REPAIRS:
                names = {seed: f"{seed}/{sparsity:g}/{method}/{repair}" for seed in seeds}
                measured = {seed: losses[name] for seed, name in names.items() if name in losses}
                if not measured:
                    continue
                over = [measured[seed] - losses[f"{seed}/{DENSE}"] for seed in measured]
                randomly = (
                    difference(measured[seed], other)
                    for seed in measured
                    if (other := losses.get(f"{seed}/{sparsity:g}/{RANDOM}/{repair}")) is not None
                )
                body.append(
                    [
                        f"{sparsity:.0%}",
                        method,
                        repair,
                        _spread([_perplexity(values) for values in measured.values()], ".1f"),
                        _spread([float(values.mean()) for values in over], "+.3f"),
                        "" if method == RANDOM else "; ".join(randomly),
                    ]
                )
    header = ["removed", "method", "repair", "perplexity", "nats over dense", "nats over random experts, by seed"]
    return table(header, body)


def _perplexity(losses):
    return math.exp(float(losses.mean()))


def _spread(values, form):
    """Return the mean of the seeds with their standard deviation, as text."""
    text = f"{statistics.mean(values):{form}}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):{form.lstrip('+')}}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration", nargs="?", help="File to train and to calibrate on, two parts of it.")
    parser.add_argument("evaluation", nargs="?", help="File to measure losses on.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6, help="How often the training text is read.")
    parser.add_argument("--windows", type=int, default=128, help=f"Evaluation windows of {WINDOW} tokens.")
    parser.add_argument("--n_samples", type=int, default=128, help=f"Calibration windows of {WINDOW} tokens.")
    parser.add_argument("--rows", nargs="*", help="Measure only rows whose names contain one of these texts.")
    parser.add_argument("--results", type=Path, default=Path("results/experts.jsonl"), help="File of finished rows.")
    parser.add_argument(
        "--table", action="store_true", help="Print the tables of the finished rows, and measure nothing."
    )
    parser.add_argument("--stack", type=int, metavar="LAYERS", help="Prune this many layers of Qwen3-30B-A3B's shape.")
    parser.add_argument("--folder", default=".", help="Where there is disk for the stack.")
    parser.add_argument("--stack_windows", type=int, default=32, help="Calibration windows of the stack.")
    parser.add_argument("--prune_stack", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.prune_stack:
        prune_stack(*options.prune_stack, options.stack_windows)
    elif options.stack:
        print(measure_stack(__file__, options))
    elif options.calibration is None or options.evaluation is None:
        parser.error("name a file to train and calibrate on and a file to measure on, or --stack LAYERS")
    else:
        measure(options)


def measure(options):
    """Measure the missing rows, and print the tables."""
    options.results.parent.mkdir(parents=True, exist_ok=True)
    every = {}
    for seed in options.seeds:
        experts = Experts(seed, options)
        rows = finished_rows(options.results, experts.settings)
        for name in experts.rows():
            is_asked = not options.rows or name.endswith(DENSE) or any(text in name for text in options.rows)
            if name in rows or options.table or not is_asked:
                continue
            start = time.perf_counter()
            figures = experts.measure(name)
            seconds = round(time.perf_counter() - start, 1)
            rows[name] = {"row": name, "settings": experts.settings, "seconds": seconds, **figures}
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[name]) + "\n")
            print(f"{name}: {_perplexity(torch.tensor(figures['losses'])):.2f} ({seconds:.0f} s)", flush=True)
        every |= rows
    text = printed(every, options.seeds)
    write_text_atomically(options.results.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
