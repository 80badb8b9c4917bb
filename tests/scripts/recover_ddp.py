"""Recover a pruned checkpoint by every mode in several processes and let the first write what came of it.

accelerate launch --cpu --num_processes 2 recover_ddp.py CHECKPOINT OUTPUT MODE [MODE ...]
"""

import json
import os
import sys
from pathlib import Path

from optimum_fwdprune import FwdPruner, RecoveryArguments


def recover(checkpoint, output, mode):
    pruner = FwdPruner.from_pretrained(checkpoint)
    args = RecoveryArguments(
        output_dir=f"{output}-training",
        mode=mode,
        max_length=16,
        max_steps=4,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        learning_rate=1e-2,
        lora_dropout=0.0,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_steps=2,
        teacher=checkpoint.replace("pruned", "dense") if mode == "distill" else None,
    )
    tokens = json.loads((Path(checkpoint).parent / "tokens.json").read_text())
    pruner.recover({"input_ids": tokens}, args)
    pruner.save_pretrained(output)
    if args.should_save:
        losses = [each["loss"] for each in pruner.trainer.state.log_history if "loss" in each]
        Path(f"{output}.json").write_text(json.dumps({"losses": losses, "processes": args.world_size}))


checkpoint, output, *modes = sys.argv[1:]
for mode in modes:
    recover(checkpoint, f"{output}-{mode}", mode)
