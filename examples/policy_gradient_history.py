"""Learn what each layer gives by policy gradient, with forward passes only, and draw how the learning went.

python examples/policy_gradient_history.py learned --steps 300
"""

import argparse
from pathlib import Path

from optimum_fwdprune import FwdPruner, PruningConfig
from optimum_fwdprune.report import history_table, plan_table, plot_history


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", help="Folder for the pruned checkpoint.")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--calibration", help="A text file or dataset; WikiText-2 by default.")
    args = parser.parse_args()

    config = PruningConfig(
        method="policy_gradient",
        sparsity=args.sparsity,
        steps=args.steps,
        calibration=args.calibration,
        # A run that was stopped goes on from this folder, bit for bit.
        resume=f"{args.output}-run",
    )
    pruner = FwdPruner.from_pretrained(args.model)
    pruner.prune(config)
    pruner.save_pretrained(args.output)

    picture = Path(args.output) / "history.svg"
    plot_history(pruner.scores.history, picture)
    print(history_table(pruner.scores.history))
    print(plan_table(pruner.plan))
    print(f"Drawn in {picture}.")


if __name__ == "__main__":
    main()
