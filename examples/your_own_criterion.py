"""A criterion of your own, in a dozen lines: options, allocation, reconstruction and the rest come for nothing.

python examples/your_own_criterion.py pruned --weigh_columns 0.5
"""

import argparse
from dataclasses import dataclass

from optimum_fwdprune import FwdPruner, PruningConfig, ScoringInputs, register_method
from optimum_fwdprune.request.fields import option


@dataclass
class ActiveConfig(PruningConfig):
    """Score of a unit: how far its activations swing, times the norm of the columns that read them to some power."""

    method: str = "active"
    weigh_columns: float = option(1.0, "Exponent of the columns' norms; 0 leaves them out.")

    def __post_init__(self):
        super().__post_init__()
        if self.weigh_columns < 0:
            raise ValueError(f"weigh_columns must be at least 0; got {self.weigh_columns}.")


def score(inputs: ScoringInputs) -> dict:
    """Higher is kept: one number per unit of every site, whatever the architecture."""
    scores = {}
    for site in inputs.sites:
        columns = site.projection.weight.detach().float().norm(dim=0) ** inputs.config.weigh_columns
        scores[site.key] = site.sum_features(columns * inputs.statistics[site.key].variance.sqrt())
    return scores


register_method(ActiveConfig, score, statistics=("moments",))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", help="Folder for the pruned checkpoint.")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--weigh_columns", type=float, default=1.0)
    parser.add_argument("--calibration", help="A text file or dataset; WikiText-2 by default.")
    args = parser.parse_args()

    # The registered name is enough: PruningConfig makes the method's own config.
    config = PruningConfig(
        method="active",
        sparsity=args.sparsity,
        weigh_columns=args.weigh_columns,
        calibration=args.calibration,
    )
    pruner = FwdPruner.from_pretrained(args.model)
    pruner.prune(config)
    pruner.save_pretrained(args.output)
    print(pruner.report)


if __name__ == "__main__":
    main()
