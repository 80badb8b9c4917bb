"""What channels, layers, and sublayers with channels cost at equal speed-ups: as cut, repaired, and distilled.

    python benchmarks/depth.py CALIBRATION_FILE EVALUATION_FILE PIQA_FILE HELLASWAG_FILE \\
        --models smol=FOLDER qwen=FOLDER [--quick] [--rows TEXT ...] [--table]

For every model, phase (prefill, decode) and speed-up, a request for each of three kinds of units is pruned to the
speed-up by one table of latencies. The result is measured as it is cut, with least squares, and after a distillation
of 64 thousand tokens: perplexity, PIQA and HellaSwag (accuracy, and margins that are compared row by row), and its
speed in turns with the dense model. Decoding is compared with the number of bytes that a step reads.

Every row is a line of `--results`, and a run that was stopped goes on with the rows that are missing. Plans and tables
of latencies are kept beside it. The table of the finished rows is printed at the end. Leave the machine idle while it
runs.
"""

import argparse
import hashlib
import json
import math
import tempfile
import time
from pathlib import Path

import torch
from study import difference, finished_rows, table
from torch.nn import functional as F

from optimum_fwdprune import FwdPruner, PruningConfig, PruningPlan, RecoveryArguments
from optimum_fwdprune.evaluation import benchmark, window_losses
from optimum_fwdprune.planning.timed_layers import filled_cache


PHASES, SPEEDUPS = ("prefill", "decode"), (1.25, 1.5, 2.0)
KINDS = {
    "channels": {"kinds": ["mlp"]},
    "layers": {"kinds": ["layer"], "method": "removal_loss"},
    "mixed": {"kinds": ["sublayer", "mlp"], "scope": "search", "depth_method": "removal_loss"},
}
REPAIRS = ("none", "repair", "distilled")
STEPS, BATCH, LENGTH, LEARNING_RATE = 64, 4, 256, 1e-3
DENSE = "dense"


class Depth:
    """The rows of one model.

    Args:
        name (`str`): name of the model.
        folder (`str`): its folder.
        options (`Namespace`): options of the command line.
    """

    def __init__(self, name, folder, options):
        self.name, self.folder, self.options = name, folder, options
        self.settings = {
            "windows": options.windows,
            "choices": options.choices,
            "tokens": options.tokens,
            "n_samples": options.n_samples,
            "search_windows": options.search_windows,
            "steps": options.steps,
            "dtype": options.dtype,
        }
        self.cache = options.results.parent / f"{options.results.stem}-{name}-{_digest(self.settings)}"
        self._dense = None

    @property
    def dense(self):
        """The pruner of the dense model."""
        if self._dense is None:
            self._dense = FwdPruner.from_pretrained(self.folder, dtype=getattr(torch, self.options.dtype))
            self._dense.model.eval()
        return self._dense

    def groups(self):
        """Yield the rows that need the same plan: its phase, speed-up and kinds, and the names of the rows."""
        yield None, [f"{self.name}/{DENSE}"]
        for phase in PHASES:
            for speedup in SPEEDUPS:
                for kinds in KINDS:
                    group = f"{self.name}/{phase}/{speedup:g}/{kinds}"
                    yield (phase, speedup, kinds), [f"{group}/{repair}" for repair in REPAIRS]

    def measure(self, group, wanted):
        """Yield the wanted rows of a group as pairs of a name and its figures."""
        if group is None:
            yield wanted[0], self._quality(self.dense.model)
            return
        try:
            plan, with_repair = self._planned(*group)
        except ValueError as error:
            for name in wanted:
                yield name, {"refused": str(error)}
            return
        for name in wanted:
            repair = name.rpartition("/")[2]
            if repair == "none" or with_repair is None:
                reconstruction = "none" if repair == "none" else "least_squares"
                pruner = self._pruner()
                pruner.prune(
                    plan=plan,
                    dataset=self.options.calibration,
                    inplace=False,
                    **self._text(),
                    reconstruction=reconstruction,
                )
            else:
                pruner = with_repair
            if repair == "distilled":
                self._distil(pruner)
                with_repair = None
            yield name, self._quality(pruner.model) | self._speed(pruner.model) | {"kept": _counts(plan)}

    def _pruner(self):
        return FwdPruner(self.dense.model, self.dense.tokenizer)

    def _text(self):
        return {"n_samples": self.options.n_samples, "seq_len": 256}

    def _planned(self, phase, speedup, kinds):
        """Return the plan of a group, and the pruner that made it; `None` where the plan was made before."""
        self.cache.mkdir(parents=True, exist_ok=True)
        file = self.cache / f"{phase}-{speedup:g}-{kinds}.json"
        if file.exists():
            return PruningPlan.load(file), None
        fields = dict(KINDS[kinds])
        if fields.get("scope") == "search":
            fields["search_windows"] = self.options.search_windows
        request = PruningConfig(
            **{"method": "wanda_sp", **fields},
            **self._text(),
            target_speedup=speedup,
            speed_of=phase,
            latency_tokens=self.options.tokens,
            latency_table=str(self.cache / "latency.json"),
        )
        pruner = self._pruner()
        pruner.prune(request, self.options.calibration, inplace=False)
        pruner.plan.save(file)
        return pruner.plan, pruner

    def _distil(self, pruner):
        with tempfile.TemporaryDirectory() as folder:
            args = RecoveryArguments(
                output_dir=folder,
                mode="distill",
                max_steps=self.options.steps,
                per_device_train_batch_size=BATCH,
                max_length=LENGTH,
                learning_rate=LEARNING_RATE,
                use_cpu=True,
                save_strategy="no",
            )
            pruner.recover(self.options.calibration, args, teacher=self.dense.model)

    def _quality(self, model):
        tokenizer, options = self.dense.tokenizer, self.options
        text = Path(options.evaluation).read_text(encoding="utf-8")
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        windows = ids[: len(ids) // 512 * 512].view(-1, 512)
        places = torch.linspace(0, len(windows) - 1, min(options.windows, len(windows))).round().long()
        figures = {"losses": window_losses(model, windows[places]).tolist()}
        for task, rows in (("piqa", _piqa(options.piqa)), ("hellaswag", _hellaswag(options.hellaswag))):
            figures[task] = _margins(model, tokenizer, rows[: options.choices])
        return figures

    def _speed(self, model):
        tokens = self.options.tokens
        dense, pruned = benchmark([self.dense.model, model], prompt_tokens=[tokens], repeats=self.options.repeats)
        before, after = dense.timings[0], pruned.timings[0]
        bytes_before, bytes_after = (_bytes_read(each, tokens) for each in (self.dense.model, model))
        faster = before.decode.median / after.decode.median
        return {
            "prefill": before.prefill.median / after.prefill.median,
            "decode": faster,
            # 1 where a step takes as much less time as it reads fewer bytes.
            "of_bytes": faster / (bytes_before / bytes_after),
        }


def _bytes_read(model, tokens):
    """Return the bytes that a decoding step reads: all weights but the rows of the embeddings, and the KV cache."""
    weights = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embeddings.data_ptr() != head.data_ptr():
        del weights[embeddings.data_ptr()]
    cache = filled_cache(model, torch.zeros(1, tokens, dtype=torch.int64))
    states = [values for layer in cache.layers for values in (layer.keys, layer.values) if values is not None]
    return sum(weights.values()) + sum(values.nbytes for values in states)


def _counts(plan):
    """Return the layers and sublayers that a plan removes, and the share of the channels that it keeps."""
    gone = [str(key) for key, kept in plan.kept.items() if not kept]
    channels = [key for key, kept in plan.kept.items() if key.kind == "mlp" and kept]
    share = sum(len(plan.kept[key]) for key in channels) / sum(plan.num_units[key] for key in channels)
    return {"removed": gone, "channels": share}


def _piqa(file):
    rows = map(json.loads, Path(file).read_text(encoding="utf-8").splitlines())
    return [
        (f"Question: {row['goal']}\nAnswer:", [f" {row['sol1']}", f" {row['sol2']}"], row["label"]) for row in rows
    ]


def _hellaswag(file):
    rows = map(json.loads, Path(file).read_text(encoding="utf-8").splitlines())
    return [(row["ctx"], [f" {ending}" for ending in row["endings"]], int(row["label"])) for row in rows]


@torch.no_grad()
def _margins(model, tokenizer, rows):
    """Return how much more probable than the best other choice the right one is, in nats per byte, row by row."""
    margins = []
    for context, choices, label in rows:
        prompt = tokenizer(context)["input_ids"]
        texts = [prompt + tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices]
        longest = max(map(len, texts))
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        nll = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        counted = mask[:, 1:].clone()
        counted[:, : len(prompt) - 1] = 0
        scores = -(nll * counted).sum(1) / torch.tensor([len(choice.encode()) for choice in choices])
        others = torch.cat([scores[:label], scores[label + 1 :]])
        margins.append(float(scores[label] - others.max()))
    return margins


def _digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def printed(rows, model):
    """Return the tables of a model, from its finished rows by name."""
    dense = rows.get(f"{model}/{DENSE}")
    if dense is None:
        return ""
    reference = torch.tensor(dense["losses"])
    body = [[DENSE, "", "", "", "", f"{math.exp(reference.mean()):.2f}", "", *_tasks(dense, None)]]
    for name, row in rows.items():
        if name == f"{model}/{DENSE}" or not name.startswith(f"{model}/"):
            continue
        _, phase, speedup, kinds, repair = name.split("/")
        if "refused" in row:
            body.append([f"{phase} {speedup}", kinds, repair, row["refused"].partition(":")[2].strip(), *[""] * 5])
            continue
        losses = torch.tensor(row["losses"])
        measured = f"{row['prefill']:.2f}, {row['decode']:.2f}"
        perplexity = f"{math.exp(losses.mean()):.2f}"
        body.append(
            [
                f"{phase} {speedup}",
                kinds,
                repair,
                measured,
                f"{row['of_bytes']:.2f}",
                perplexity,
                difference(losses, reference),
                *_tasks(row, dense),
            ]
        )
    header = [
        "speed-up",
        "units",
        "repair",
        "prefill, decode measured",
        "decode, of its bytes",
        "perplexity",
        "nats over dense",
        "PIQA",
        "HellaSwag",
    ]
    return f"## {model}\n\n{table(header, body)}\n{_aims(rows, model, reference)}"


def _tasks(row, dense):
    """Return the accuracy of each task, with the paired difference of margins from the dense model."""
    cells = []
    for task in ("piqa", "hellaswag"):
        margins = torch.tensor(row[task])
        text = f"{float((margins > 0).double().mean()):.1%}"
        cells.append(text if dense is None else f"{text} ({difference(margins, torch.tensor(dense[task]))})")
    return cells


def _aims(rows, model, dense):
    """Return the aims of the study with what was found: the share that repair takes back, and the mixed requests."""
    lines = []
    measured = {name: torch.tensor(row["losses"]) for name, row in rows.items() if "losses" in row}
    for phase in PHASES:
        for speedup in SPEEDUPS:
            start = f"{model}/{phase}/{speedup:g}"
            for kinds in KINDS:
                cut, repaired = (measured.get(f"{start}/{kinds}/{repair}") for repair in ("none", "repair"))
                if cut is not None and repaired is not None:
                    share = float((cut - repaired).mean() / (cut - dense).mean())
                    lines.append(
                        [f"{phase} {speedup:g}", f"{kinds}: nats that least squares takes back", f"{share:.0%}"]
                    )
            for repair in REPAIRS:
                pure = [
                    losses
                    for kinds in ("channels", "layers")
                    if (losses := measured.get(f"{start}/{kinds}/{repair}")) is not None
                ]
                mixed = measured.get(f"{start}/mixed/{repair}")
                if pure and mixed is not None:
                    best = min(pure, key=lambda losses: float(losses.mean()))
                    lines.append(
                        [f"{phase} {speedup:g}", f"mixed less the better pure one, {repair}", difference(mixed, best)]
                    )
    return table(["speed-up", "compared", "nats"], lines) if lines else ""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("calibration", "evaluation", "piqa", "hellaswag"):
        parser.add_argument(name, help=f"File of {name} data.")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--results", type=Path, default=Path("results/depth.jsonl"), help="File of the finished rows.")
    parser.add_argument("--rows", nargs="*", help="Measure only rows whose names contain one of these texts.")
    parser.add_argument("--quick", action="store_true", help="A small part of the texts, for a first look.")
    parser.add_argument(
        "--table", action="store_true", help="Print the table of the finished rows, and measure nothing."
    )
    parser.add_argument("--windows", type=int, default=64, help="Evaluation windows of 512 tokens.")
    parser.add_argument("--choices", type=int, default=300, help="Rows of PIQA and of HellaSwag.")
    parser.add_argument("--tokens", type=int, default=512, help="Tokens of the prompt, and in the KV cache.")
    parser.add_argument("--n_samples", type=int, default=128, help="Calibration windows of 256 tokens.")
    parser.add_argument("--search_windows", type=int, default=2000, help="search_windows of the mixed requests.")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"Steps of the distillation, {BATCH * LENGTH} tokens each."
    )
    parser.add_argument("--repeats", type=int, default=7, help="Timed runs of every model, in turns.")
    parser.add_argument("--dtype", default="float32", help="Dtype of the models.")
    options = parser.parse_args(argv)
    if options.quick:
        options.windows, options.choices, options.tokens, options.n_samples = 4, 8, 64, 16
        options.search_windows, options.steps, options.repeats = 200, 2, 2
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for entry in options.models:
        name, _, folder = entry.partition("=")
        model = Depth(name, folder, options)
        rows = finished_rows(options.results, model.settings)
        for group, names in [] if options.table else model.groups():
            wanted = [row for row in names if row not in rows and _is_asked(row, options.rows)]
            if not wanted:
                continue
            start = time.perf_counter()
            for row, figures in model.measure(group, wanted):
                seconds = round(time.perf_counter() - start, 1)
                rows[row] = {"row": row, "settings": model.settings, "seconds": seconds, **figures}
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[row]) + "\n")
                print(f"{row} ({seconds:.0f} s)", flush=True)
                start = time.perf_counter()
        print(printed(rows, name))


def _is_asked(row, asked):
    return not asked or row.endswith(f"/{DENSE}") or any(text in row for text in asked)


if __name__ == "__main__":
    main()
