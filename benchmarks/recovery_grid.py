"""What every mode of recovery brings after every pruning, at several amounts of text.

    python benchmarks/recovery_grid.py MODEL CALIBRATION_FILE EVALUATION_FILE PIQA_FILE HELLASWAG_FILE

Prunes MODEL by 40 % with `best` and with `fast`, and removes 20 % of its layers; then recovers each with every mode on
CALIBRATION_FILE mixed with text that the teacher writes. Measures perplexity on EVALUATION_FILE and on Python's
documentation, accuracy on rows of PIQA and HellaSwag through lm-evaluation-harness, minutes, and peak memory. Every
row runs in a process of its own and is appended to --rows (JSON lines); rows that are there are not measured again. An
interrupted row resumes from its checkpoints. --smoke measures one tiny row of every mode. Prints a table.
"""

import argparse
import json
import math
import multiprocessing
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from recovery import PIQA
from study import digest_of, log, python_documentation, table

from optimum_fwdprune import FwdPruner, RecoveryArguments
from optimum_fwdprune.evaluation import PeakMemory, evaluate_tasks, window_losses
from optimum_fwdprune.recovery import Mixture


PRUNINGS = {
    "40 % best": ("best", {"sparsity": 0.4}),
    "40 % fast": ("fast", {"sparsity": 0.4}),
    "20 % of the layers": (None, {"method": "block_influence", "kinds": ["layer"], "sparsity": 0.2}),
}
MODES = {
    "nothing": None,
    "LoRA": {"mode": "lora"},
    "full": {"mode": "full"},
    "distillation": {"mode": "distill", "adapters": False},
    "blocks": {"mode": "block_distill"},
    "blocks, then whole": {"mode": "block_distill", "then": "distill", "adapters": False},
}
# Modes without a teacher train on the file alone.
TAUGHT = ("distillation", "blocks", "blocks, then whole")
TOKENS = ("64K", "256K", "1M")
WINDOW = 512
HELLASWAG = """
task: hellaswag_sample
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{ctx}}}}"
doc_to_target: label
doc_to_choice: endings
metric_list: [{{metric: acc_norm}}]
"""


def pruned(args, pruning):
    """The folder of the pruned model, which is made where it is missing."""
    folder = Path(args.work) / f"pruned-{digest_of(args.model, args.calibration_file, args.smoke, PRUNINGS[pruning])}"
    if not folder.exists():
        preset, fields = PRUNINGS[pruning]
        calibration = {"n_samples": 8, "seq_len": 64} if args.smoke else {}
        pruner = FwdPruner.from_pretrained(args.model)
        pruner.prune(preset, args.calibration_file, **fields, **calibration)
        pruner.save_pretrained(folder)
    return folder


def arguments(args, mode, tokens, folder):
    length = 64 if args.smoke else 512
    return RecoveryArguments(
        output_dir=str(folder),
        tokens=tokens,
        max_length=length,
        per_device_train_batch_size=4,
        save_strategy="steps",
        # A run that was stopped goes on.
        resume_from_checkpoint="true" if any(folder.glob("checkpoint-*")) or (folder / "blocks").exists() else None,
        save_steps=50,
        save_total_limit=1,
        report_to="none",
        **MODES[mode],
    )


def measured(args, pruning, mode, tokens):
    """Recover a pruned model and return the figures of the row."""
    pruner = FwdPruner.from_pretrained(pruned(args, pruning))
    row = {}
    if MODES[mode] is not None:
        folder = Path(args.work) / f"training-{digest_of(args.model, pruning, mode, tokens)}"
        data = args.calibration_file
        if mode in TAUGHT:
            data = Mixture([args.calibration_file, "self"], [1, 1])
        start = time.perf_counter()
        with PeakMemory(pruner.model.device) as peak:
            pruner.recover(data, arguments(args, mode, tokens, folder), teacher=args.model if mode in TAUGHT else None)
        row |= {"minutes": round((time.perf_counter() - start) / 60, 2), "peak MiB": round(peak.bytes / 2**20)}
        row["recovery"] = {name: value for name, value in pruner.recovery.items() if name != "blocks"}
        shutil.rmtree(folder, ignore_errors=True)
    return row | quality(args, pruner)


def quality(args, pruner):
    """Perplexity on both texts, and accuracies."""
    texts = {"evaluation": Path(args.evaluation_file).read_text(encoding="utf-8"), "python": python_documentation()}
    row = {}
    for name, text in texts.items():
        ids = pruner.tokenizer(text, verbose=False)["input_ids"]
        windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)[: 2 if args.smoke else 32]
        row[name] = round(math.exp(float(window_losses(pruner.model, windows).mean())), 3)
    with tempfile.TemporaryDirectory() as folder:
        for name, task, file in (("piqa", PIQA, args.piqa_file), ("hellaswag", HELLASWAG, args.hellaswag_file)):
            rows = Path(file).read_text(encoding="utf-8").splitlines()
            sample = Path(folder) / f"{name}.jsonl"
            sample.write_text("\n".join(rows[: 4 if args.smoke else None]) + "\n", encoding="utf-8")
            (Path(folder) / f"{name}.yaml").write_text(task.format(file=sample), encoding="utf-8")
        for score in evaluate_tasks(pruner.model, pruner.tokenizer, [folder], batch_size=16):
            row[f"{score.task} {score.metric}"] = [round(score.value, 4), round(score.standard_error, 4)]
    return row


def grid(args):
    """The rows to measure: pruning, mode and tokens."""
    for pruning in args.prunings:
        for mode in args.modes:
            for tokens in args.tokens if MODES[mode] is not None else args.tokens[:1]:
                yield {"model": Path(args.model).name, "pruning": pruning, "mode": mode, "tokens": tokens}


def run(args):
    rows_file = Path(args.rows)
    rows_file.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in rows_file.read_text().splitlines()] if rows_file.exists() else []
    for cell in grid(args):
        if any(cell.items() <= row.items() for row in done):
            continue
        start = time.perf_counter()
        # In a process where no memory is left over from the row before.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            figures = pool.submit(measured, args, cell["pruning"], cell["mode"], cell["tokens"]).result()
        done.append({**cell, **figures})
        with rows_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(done[-1]) + "\n")
        log(f"{cell['pruning']}, {cell['mode']}, {cell['tokens']}", start)
    names = list(dict.fromkeys(name for row in done for name in row if name != "recovery"))
    print(table(names, [[shown(row.get(name, "")) for name in names] for row in done]))


def shown(value):
    return f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}" if isinstance(value, list) else value


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("model", "calibration_file", "evaluation_file", "piqa_file", "hellaswag_file"):
        parser.add_argument(name)
    parser.add_argument("--prunings", nargs="+", default=list(PRUNINGS), choices=list(PRUNINGS))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--tokens", nargs="+", default=list(TOKENS[:2]), help="default: 64K 256K")
    parser.add_argument("--rows", default="benchmarks/results/recovery_grid.jsonl")
    parser.add_argument("--work", default=".cache/recovery_grid", help="Folder of pruned models and checkpoints.")
    parser.add_argument("--smoke", action="store_true", help="Tiny amounts: whether it runs, and no figures.")
    args = parser.parse_args()
    if args.smoke:
        args.tokens = ["1K"]
    run(args)


if __name__ == "__main__":
    main()
