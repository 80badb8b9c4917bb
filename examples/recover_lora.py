"""Prune, then train LoRA adapters on text and merge them: the smallest recovery, on the Trainer.

python examples/recover_lora.py recovered --max_steps 200
"""

import argparse

from optimum_fwdprune import FwdPruner, RecoveryArguments


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", help="Folder for the recovered checkpoint.")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--dataset", default="wikitext2", help="A text file or dataset, to calibrate and train on.")
    parser.add_argument("--max_steps", type=int, default=200)
    args = parser.parse_args()

    pruner = FwdPruner.from_pretrained(args.model)
    pruner.prune(sparsity=args.sparsity, calibration=args.dataset)
    print(pruner.report)

    # Everything that TrainingArguments knows goes here too.
    arguments = RecoveryArguments(
        output_dir=f"{args.output}-training",
        mode="lora",
        lora_r=8,
        max_steps=args.max_steps,
        logging_steps=1,
        per_device_train_batch_size=4,
        report_to="none",
    )
    pruner.recover(args.dataset, arguments)
    pruner.save_pretrained(args.output)
    losses = [float(entry["loss"]) for entry in pruner.trainer.state.log_history if "loss" in entry]
    print(f"Training loss: {' '.join(f'{loss:.3f}' for loss in losses)}")
    print(f"Saved to {args.output}: a plain pruned checkpoint, the adapters merged.")


if __name__ == "__main__":
    main()
