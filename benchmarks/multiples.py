"""What widths for kernels and for blocks of GGUF files cost in quality: perplexity by `multiple_of` at one sparsity.

    python benchmarks/multiples.py MODEL CALIBRATION_FILE EVALUATION_FILE [--sparsity 0.4] [--multiples 1 64 256]

The model is loaded once for every multiple, and pruned with the preset `fast`. All of them choose by the same scores.
Perplexity is measured on the first windows of EVALUATION_FILE, which must be another text than CALIBRATION_FILE.
"""

import argparse
from pathlib import Path

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.evaluation import perplexity


WINDOW = 512


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--sparsity", type=float, default=0.4)
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--windows", type=int, default=32, help=f"windows of {WINDOW} tokens to measure on")
    parser.add_argument("--n_samples", type=int, default=128, help="calibration windows of 256 tokens")
    args = parser.parse_args()
    text, request = Path(args.evaluation).read_text(encoding="utf-8"), {"sparsity": args.sparsity}
    request |= {"calibration": args.calibration, "n_samples": args.n_samples}
    scores = None
    for multiple in args.multiples:
        pruner = FwdPruner.from_pretrained(args.model, dtype="auto")
        tokens = pruner.tokenizer(text, return_tensors="pt")["input_ids"][0]
        windows = tokens[: args.windows * WINDOW].view(args.windows, WINDOW)
        if scores is None:
            print(f"dense: {perplexity(pruner.model, windows):.2f}", flush=True)
            scores = pruner.score("fast", **request)
        pruner.prune("fast", scores=scores, multiple_of=multiple, **request)
        removed = pruner.report.removed_parameters / pruner.report.prunable_parameters
        widths = sorted({len(units) for (_, kind), units in pruner.plan.kept.items() if kind == "mlp"})
        print(
            f"multiple_of={multiple}: perplexity {perplexity(pruner.model, windows):.2f}, {removed:.2%} of the "
            f"prunable parameters removed, MLP widths {', '.join(map(str, widths))}",
            flush=True,
        )


if __name__ == "__main__":
    main()
