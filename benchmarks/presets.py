"""What pruning costs a model in quality: the presets beside FLAP and Wanda-sp, row by row.

    python benchmarks/presets.py MODEL CALIBRATION_FILE EVALUATION_FILE [--rows TEXT ...] [--table]

Prunes the model in the folder MODEL, in the dtype of its checkpoint unless --dtype names another, with requests of
`benchmarks/quality.py`, all calibrated on the same windows of 256 tokens. Perplexity is measured on windows of 512
tokens of EVALUATION_FILE, which must be another text, and compared window by window. Logits are converted to
probabilities in slices, so that a large vocabulary takes no more memory.

Every row is a line of `--results`, and a run that was stopped goes on with the rows that are missing. The table of the
finished rows is printed at the end.
"""

import argparse
import hashlib
import itertools
import json
import math
import time
from pathlib import Path

import torch
from quality import CALIBRATION, REQUESTS
from study import difference, table

from optimum_fwdprune import FwdPruner, PruningConfig, find_sites
from optimum_fwdprune.evaluation import window_losses
from optimum_fwdprune.loading.tokenizers import starting_tokens


SPARSITIES = (0.4, 0.2)
OTHERS = ("flap, per layer", "flap, global", "wanda_sp, heads too, none")
BASELINE, OURS = "fast", ("balanced", "best")
DENSE = "dense"
LENGTH = 512


# The names of all rows, as pairs of a recipe and a sparsity.
ROWS = [(DENSE, 0.0), *itertools.product([BASELINE, *OURS, *OTHERS], SPARSITIES)]


def measure(pruner, recipe, sparsity, options):
    """Prune the model of `pruner` by a recipe, and return its losses, the seconds and what was removed."""
    start = time.perf_counter()
    model, before = pruner.model, pruner.model.num_parameters()
    prunable = sum(site.num_parameters for site in find_sites(model))
    if recipe != DENSE:
        request = PruningConfig(
            **{**CALIBRATION, "n_samples": options.n_samples, **REQUESTS[recipe]},
            sparsity=sparsity,
            calibration=options.calibration,
        )
        model = pruner.prune(request)
    seconds = round(time.perf_counter() - start)
    windows = evaluation_windows(pruner.tokenizer, options)
    return {
        "losses": [round(loss, 5) for loss in window_losses(model, windows, batch_size=1).tolist()],
        "seconds": seconds,
        "removed": (before - model.num_parameters()) / prunable,
    }


def evaluation_windows(tokenizer, options):
    """Return windows that are evenly spread over the text, `[windows, 512]`. They start with the special tokens that
    the tokenizer writes before a text, such as BOS."""
    text = Path(options.evaluation).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    start = torch.tensor(starting_tokens(tokenizer, LENGTH), dtype=torch.int64)
    of_text = LENGTH - len(start)
    windows = ids[: len(ids) // of_text * of_text].view(-1, of_text)
    windows = windows[torch.linspace(0, len(windows) - 1, min(options.windows, len(windows))).round().long()]
    return torch.cat([start.expand(len(windows), -1), windows], dim=1)


def finished(file, settings):
    """Return the rows of a file that were measured with these settings, by recipe and sparsity."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            # The run was killed while it wrote this line.
            continue
        if row["settings"] == settings:
            rows[row["recipe"], row["sparsity"]] = row
    return rows


def printed(rows):
    """Return the table of finished rows."""
    body = []
    for (recipe, sparsity), row in rows.items():
        losses = _losses(row)
        others = [_losses(rows[name, sparsity]) for name in OTHERS if (name, sparsity) in rows]
        compared = [
            min(others, key=lambda values: float(values.mean()), default=None),
            *(_losses(rows[key]) if key in rows else None for key in ((BASELINE, sparsity), (DENSE, 0.0))),
        ]
        cells = ["" if other is None else _ratio(losses, other) for other in compared]
        body.append([f"{sparsity:.0%}", recipe, f"{_perplexity(losses):.2f}", *cells, row["seconds"]])
    header = ["removed", "recipe", "perplexity", "against the best of FLAP and Wanda-sp", f"against {BASELINE}"]
    return table([*header, "against dense", "seconds of pruning"], body)


def _losses(row):
    return torch.tensor(row["losses"], dtype=torch.float64)


def _perplexity(losses):
    return math.exp(float(losses.mean()))


def _ratio(losses, others):
    """Return the ratio of two perplexities, with the paired difference in nats."""
    return f"x{math.exp(float((losses - others).mean())):.3f} ({difference(losses, others)})"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "evaluation"):
        parser.add_argument(name, help="Folder of the model." if name == "model" else f"File of {name} text.")
    parser.add_argument("--results", type=Path, default=Path("results/presets.jsonl"), help="File of finished rows.")
    parser.add_argument("--rows", nargs="*", help="Measure only rows whose names contain one of these texts.")
    parser.add_argument("--at_most", type=int, help="Measure at most so many rows, and end.")
    parser.add_argument("--windows", type=int, default=48, help="Evaluation windows of 512 tokens.")
    parser.add_argument("--n_samples", type=int, default=128, help="Calibration windows of 256 tokens.")
    parser.add_argument("--dtype", default="auto", help="Such as float32, where a processor has no fast bfloat16.")
    parser.add_argument("--table", action="store_true", help="Print the table, and measure nothing.")
    options = parser.parse_args(argv)
    config = Path(options.model, "config.json").read_bytes()
    settings = {
        "model": hashlib.sha256(config).hexdigest()[:8],
        "windows": options.windows,
        **CALIBRATION,
        "n_samples": options.n_samples,
    }
    if options.dtype != "auto":
        settings["dtype"] = options.dtype
    options.results.parent.mkdir(parents=True, exist_ok=True)
    rows = finished(options.results, settings)
    missing = [] if options.table else [row for row in ROWS if row not in rows]
    wanted = [row for row in missing if is_wanted(f"{row[0]} {row[1]:g}", options.rows)]
    for recipe, sparsity in wanted[: options.at_most]:
        figures = measure(load(options.model, options.dtype), recipe, sparsity, options)
        rows[recipe, sparsity] = {"recipe": recipe, "sparsity": sparsity, "settings": settings, **figures}
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[recipe, sparsity]) + "\n")
        print(f"{recipe} {sparsity:g}: {_perplexity(_losses(figures)):.2f}", flush=True)
    print(printed(rows))


def load(folder, dtype="auto"):
    """Return the pruner of the dense model, by default in the dtype of its checkpoint."""
    pruner = FwdPruner.from_pretrained(folder, dtype=dtype)
    pruner.model.eval()
    return pruner


def is_wanted(row, texts):
    return not texts or any(text in row for text in texts)


if __name__ == "__main__":
    main()
