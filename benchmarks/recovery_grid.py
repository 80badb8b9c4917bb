"""What every mode of recovery brings after every pruning, at several amounts of text.

    python benchmarks/recovery_grid.py CALIBRATION_FILE EVALUATION_FILE PIQA_FILE HELLASWAG_FILE \\
        --models smol=FOLDER qwen=FOLDER [--quick] [--rows TEXT ...] [--table]

Prunes every model by 40 % with `best` and with `fast`, and removes 20 % of its layers; then recovers each with every
mode on CALIBRATION_FILE mixed with text that the teacher writes. Measures the losses of windows of EVALUATION_FILE and
of Python's documentation, accuracy on rows of PIQA and HellaSwag through lm-evaluation-harness, time, and memory.

Every row is measured in a process of its own, and is a line of `--results`. Rows with few tokens come first, so that a
run may be stopped at any time; it goes on with the rows that are missing, and within a row from its last checkpoint.
`--rows` selects rows whose names contain one of these texts, such as `best/distillation` or `/64K`. `--quick` shows
whether everything runs. The table of the finished rows is printed at the end; losses are compared window by window.
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
from study import difference, digest_of, python_documentation, table

from optimum_fwdprune import FwdPruner, Mixture, RecoveryArguments
from optimum_fwdprune.evaluation import PeakMemory, evaluate_tasks, window_losses
from optimum_fwdprune.recovery.arguments import last_checkpoint
from optimum_fwdprune.recovery.resuming import BLOCKS_FOLDER


PRUNINGS = {
    "best": ("best", {"sparsity": 0.4}),
    "fast": ("fast", {"sparsity": 0.4}),
    "layers": (None, {"method": "block_influence", "kinds": ["layer"], "sparsity": 0.2}),
}
MODES = {
    "nothing": None,
    "lora": {"mode": "lora"},
    "full": {"mode": "full"},
    "distillation": {"mode": "distill", "adapters": False},
    "blocks": {"mode": "block_distill"},
    "blocks-whole": {"mode": "block_distill", "then": "distill", "adapters": False},
}
# Modes without a teacher train on the file alone.
TAUGHT = ("distillation", "blocks", "blocks-whole")
DENSE = "dense"
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


def settings_of(options):
    """Return what the figures of a row depend on besides its name."""
    return {name: getattr(options, name) for name in ("windows", "choices", "n_samples", "max_length", "batch_size")}


def row_names(model, options):
    """Yield the names of all rows of a model, those with few tokens first."""
    yield f"{model}/{DENSE}"
    for pruning in PRUNINGS:
        yield f"{model}/{pruning}/nothing"
    for tokens in options.tokens:
        for pruning in PRUNINGS:
            for mode in MODES:
                if MODES[mode] is not None:
                    yield f"{model}/{pruning}/{mode}/{tokens}"


def pruned(folder, pruning, options):
    """Return the folder of the pruned model, which is made where it is missing."""
    preset, fields = PRUNINGS[pruning]
    inputs = (folder, options.calibration, options.n_samples, options.max_length, PRUNINGS[pruning])
    place = options.work / f"pruned-{digest_of(*inputs)}"
    if not place.exists():
        pruner = FwdPruner.from_pretrained(folder)
        text = {} if options.n_samples is None else {"n_samples": options.n_samples, "seq_len": options.max_length}
        resume = str(options.work / f"states-{digest_of(*inputs)}")
        pruner.prune(preset, options.calibration, **fields, **text, resume=resume)
        pruner.save_pretrained(place)
        shutil.rmtree(resume, ignore_errors=True)
    return place


def arguments(mode, tokens, folder, options):
    # A run that was stopped goes on.
    resumes = last_checkpoint(folder) is not None or any((folder / BLOCKS_FOLDER).glob("*.safetensors"))
    return RecoveryArguments(
        output_dir=str(folder),
        tokens=tokens,
        max_length=options.max_length,
        per_device_train_batch_size=options.batch_size,
        save_strategy="steps",
        resume_from_checkpoint="true" if resumes else None,
        save_steps=50,
        save_total_limit=1,
        report_to="none",
        **MODES[mode],
    )


def measured(row, folder, options):
    """Recover a pruned model and return the figures of a row."""
    _, pruning, *rest = row.split("/")
    if pruning == DENSE:
        return quality(FwdPruner.from_pretrained(folder), options)
    pruner = FwdPruner.from_pretrained(pruned(folder, pruning, options))
    figures = {}
    if rest != ["nothing"]:
        mode, tokens = rest
        training = options.work / f"training-{digest_of(row, folder, settings_of(options))}"
        data = Mixture([options.calibration, "self"], [1, 1]) if mode in TAUGHT else options.calibration
        start = time.perf_counter()
        with PeakMemory(pruner.model.device) as peak:
            teacher = folder if mode in TAUGHT else None
            pruner.recover(data, arguments(mode, tokens, training, options), teacher=teacher)
        figures |= {"minutes": round((time.perf_counter() - start) / 60, 2), "MiB": round(peak.bytes / 2**20)}
        figures["recovery"] = {name: value for name, value in pruner.recovery.items() if name != "blocks"}
        shutil.rmtree(training, ignore_errors=True)
    return figures | quality(pruner, options)


def quality(pruner, options):
    """Return the losses of windows of both texts, and accuracies with their standard errors."""
    texts = {"evaluation": Path(options.evaluation).read_text(encoding="utf-8"), "python": python_documentation()}
    figures = {}
    for name, text in texts.items():
        ids = torch.tensor(pruner.tokenizer(text, verbose=False)["input_ids"])
        windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
        places = torch.linspace(0, len(windows) - 1, min(options.windows, len(windows))).round().long()
        figures[name] = window_losses(pruner.model, windows[places]).tolist()
    with tempfile.TemporaryDirectory() as folder:
        for name, task, file in (("piqa", PIQA, options.piqa), ("hellaswag", HELLASWAG, options.hellaswag)):
            rows = Path(file).read_text(encoding="utf-8").splitlines()
            sample = Path(folder) / f"{name}.jsonl"
            sample.write_text("\n".join(rows[: options.choices]) + "\n", encoding="utf-8")
            (Path(folder) / f"{name}.yaml").write_text(task.format(file=sample), encoding="utf-8")
        for score in evaluate_tasks(pruner.model, pruner.tokenizer, [folder], batch_size=16):
            figures[f"{score.task} {score.metric}"] = [round(score.value, 4), round(score.standard_error, 4)]
    return figures


def finished(file, settings):
    """Return the rows of a file that were measured with these settings, by name."""
    rows = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            # The run was killed while it wrote this line.
            continue
        if row["settings"] == settings:
            rows[row["row"]] = row
    return rows


def printed(rows, model):
    """Return the table of the finished rows of a model."""
    own = {name: row for name, row in rows.items() if name.startswith(f"{model}/")}
    if not own:
        return f"No row of {model} is finished."
    dense = own.get(f"{model}/{DENSE}", {})
    tasks = sorted({name for row in own.values() for name in row if "acc" in name})
    body = []
    for name, row in own.items():
        losses = [torch.tensor(row[text]) for text in ("evaluation", "python")]
        apart = difference(losses[0], torch.tensor(dense["evaluation"])) if dense and row is not dense else ""
        accuracies = [f"{100 * row[task][0]:.1f} ± {100 * row[task][1]:.1f}" for task in tasks]
        perplexities = [f"{math.exp(float(values.mean())):.2f}" for values in losses]
        body.append(
            [name.partition("/")[2], perplexities[0], apart, perplexities[1], *accuracies]
            + [str(row.get(figure, "")) for figure in ("minutes", "MiB")]
        )
    header = ["row", "perplexity", "nats over dense", "Python's documentation", *tasks, "minutes", "peak MiB"]
    return f"## {model}\n\n{table(header, body)}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("calibration", "evaluation", "piqa", "hellaswag"):
        parser.add_argument(name, help=f"File of {name} data.")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--tokens", nargs="+", default=["64K", "256K"], help="Amounts of text, such as 64K 256K 1M.")
    parser.add_argument("--rows", nargs="*", help="Measure only rows whose names contain one of these texts.")
    parser.add_argument(
        "--results", type=Path, default=Path("results/recovery_grid.jsonl"), help="File of the finished rows."
    )
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/recovery_grid"), help="Folder of pruned models and checkpoints."
    )
    parser.add_argument("--quick", action="store_true", help="Tiny amounts: whether it runs, and no figures.")
    parser.add_argument(
        "--table", action="store_true", help="Print the table of the finished rows, and measure nothing."
    )
    parser.add_argument("--windows", type=int, default=32, help="Windows of 512 tokens of both texts.")
    parser.add_argument("--choices", type=int, default=300, help="Rows of PIQA and of HellaSwag.")
    parser.add_argument("--n_samples", type=int, help="Calibration windows. Default: those of the preset.")
    parser.add_argument("--max_length", type=int, default=512, help="Tokens per training sequence.")
    parser.add_argument("--batch_size", type=int, default=4, help="Sequences per step.")
    options = parser.parse_args(argv)
    if options.quick:
        options.tokens, options.windows, options.choices = ["1K"], 2, 4
        options.n_samples, options.max_length, options.batch_size = 8, 64, 4
    options.results.parent.mkdir(parents=True, exist_ok=True)
    settings = settings_of(options)
    for entry in options.models:
        model, _, folder = entry.partition("=")
        rows = finished(options.results, settings)
        for row in [] if options.table else row_names(model, options):
            if row in rows or not is_asked(row, options.rows):
                continue
            start = time.perf_counter()
            # In a process where no memory is left over from the row before.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                figures = pool.submit(measured, row, folder, options).result()
            seconds = round(time.perf_counter() - start, 1)
            rows[row] = {"row": row, "settings": settings, "seconds": seconds, **figures}
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[row]) + "\n")
            print(f"{row} ({seconds:.0f} s)", flush=True)
        print(printed(rows, model))


def is_asked(row, asked):
    return not asked or row.endswith(f"/{DENSE}") or any(text in row for text in asked)


if __name__ == "__main__":
    main()
