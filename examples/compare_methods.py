"""Prune the same model by several methods, all with the same budget, text and reconstruction, and compare.

python examples/compare_methods.py --methods wanda_sp flap magnitude random
"""

import argparse

from optimum_fwdprune import FwdPruner, PruningConfig
from optimum_fwdprune.data.texts import open_texts
from optimum_fwdprune.evaluation import text_loss
from optimum_fwdprune.report import render_table


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--methods", nargs="+", default=["wanda_sp", "flap", "magnitude", "random"])
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--calibration", help="A text file or dataset; WikiText-2 by default.")
    parser.add_argument("--held_out", default="builtin", help="Another text, to judge by.")
    parser.add_argument("--tokens", type=int, default=8192, help="How much of it.")
    args = parser.parse_args()

    pruner = FwdPruner.from_pretrained(args.model)
    dense, tokenizer = pruner.model, pruner.tokenizer
    text = "".join(open_texts(args.held_out)[1])
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0, : args.tokens]
    before = text_loss(dense, ids, max_length=512)

    rows = [("dense", f"{before.perplexity:.1f}", "", "")]
    for method in args.methods:
        config = PruningConfig(
            method=method,
            sparsity=args.sparsity,
            calibration=args.calibration,
        )
        pruner = FwdPruner(dense, tokenizer)
        pruned = pruner.prune(config, inplace=False)
        after = text_loss(pruned, ids, max_length=512)
        ratio = after.perplexity / before.perplexity
        rows.append((method, f"{after.perplexity:.1f}", f"x{ratio:.2f}", f"{pruner.report.sparsity:.1%}"))
    print(render_table(("method", "perplexity", "against dense", "removed"), rows))


if __name__ == "__main__":
    main()
