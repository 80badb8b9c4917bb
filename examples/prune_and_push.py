"""Prune a model, measure what that cost, and push the result to the Hub with a card that tells all of it.

hf auth login
python examples/prune_and_push.py me/smollm2-135m-pruned
"""

import argparse

from optimum_fwdprune import FwdPruner, PruningConfig
from optimum_fwdprune.data.texts import BUILTIN, open_texts
from optimum_fwdprune.evaluation import compare


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("repository", help="Where to push to; it is created where it is missing.")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--calibration", help="A text file or dataset; WikiText-2 by default.")
    parser.add_argument("--public", action="store_true")
    args = parser.parse_args()

    pruner = FwdPruner.from_pretrained(args.model)
    dense = pruner.model
    config = PruningConfig.from_preset("balanced", sparsity=args.sparsity, calibration=args.calibration)
    # The dense model stays, to be compared with.
    pruned = pruner.prune(config, inplace=False)
    print(pruner.report)

    # Python's documentation is at hand everywhere, and nothing was calibrated on it.
    held_out = "".join(open_texts(BUILTIN)[1])[:20_000]
    pruner.comparison = compare(
        {"dense": dense, "pruned": pruned},
        pruner.tokenizer,
        {"Python's documentation": [held_out]},
        prompt_tokens=(128,),
    )
    print(pruner.comparison)

    commit = pruner.push_to_hub(args.repository, private=not args.public)
    print(f"Pushed: {commit.commit_url}")


if __name__ == "__main__":
    main()
