"""Distil the dense model into a pruned one: its predictions are kept on disk, so only one model is in memory.

python examples/recover_distill.py pruned distilled --max_steps 500
"""

import argparse

from optimum_fwdprune import FwdPruner, RecoveryArguments


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pruned", help="Folder or repository of a pruned checkpoint.")
    parser.add_argument("output", help="Folder for the recovered checkpoint.")
    parser.add_argument("--teacher", default="HuggingFaceTB/SmolLM2-135M", help="What was pruned.")
    parser.add_argument("--dataset", default="wikitext2", help="A text file or dataset.")
    parser.add_argument("--max_steps", type=int, default=500)
    args = parser.parse_args()

    pruner = FwdPruner.from_pretrained(args.pruned)
    arguments = RecoveryArguments(
        output_dir=f"{args.output}-training",
        mode="distill",
        # All weights here; without this line, LoRA adapters.
        adapters=False,
        distill_weight=0.5,
        teacher_cache=f"{args.output}-teacher",
        max_steps=args.max_steps,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="none",
    )
    pruner.recover(args.dataset, arguments, teacher=args.teacher)
    pruner.save_pretrained(args.output)
    losses = [float(entry["loss"]) for entry in pruner.trainer.state.log_history if "loss" in entry]
    print(f"Loss: {losses[0]:.3f} at first, {losses[-1]:.3f} in the end.")


if __name__ == "__main__":
    main()
