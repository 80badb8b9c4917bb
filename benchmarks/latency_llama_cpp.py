"""Writes a table of latencies in llama.cpp, for `target_speedup` with `latency_table`.

    python benchmarks/latency_llama_cpp.py MODEL llama_cpp.json [--dtype q8_0] [--tokens 512] [--context 512]

llama.cpp runs in this process (`pip install xllamacpp`). It times whole models only: the dense one, and models that
keep fewer heads or channels in every layer, lack all MLPs or the attention of all layers but one, or have half of the
layers. The differences between their times, divided by the number of layers that differ, are those of a layer. The
table is for the same model and for the number of threads, the dtype and the llama.cpp of the run.

Where llama.cpp has no layers without attention or MLP for the family, the time of a sublayer is extrapolated from its
two narrowest widths. Leave the machine idle while it runs.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import urllib.request
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_fwdprune import FwdPruner, PruningConfig, PruningPlan, find_sites
from optimum_fwdprune.allocation.constraints import levels_of
from optimum_fwdprune.export import export_gguf
from optimum_fwdprune.planning.latency import Latencies, LatencyTable, at_measured_widths, shape_of
from optimum_fwdprune.planning.timing import circumstances, widest_sites


PHASES = ("prefill", "decode")


def table_of(model, seconds, machine, tokens, widths=4):
    """Return the table of a model.

    Args:
        model (`PreTrainedModel`): the dense model.
        seconds (`Callable`): seconds of a plan's model by phase, or `None` where llama.cpp cannot hold it.
        machine (`dict`): the machine and program that run the models.
        tokens (`dict[str, int]`): tokens of the prompt, and in the KV cache, by phase.
        widths (`int`, defaults to 4): how many widths of every kind of sublayer are timed, besides the dense one.
    """
    sites = find_sites(model)
    config = at_measured_widths(sites, PruningConfig())
    whole = {site.key: list(range(site.num_units)) for site in sites}
    dense = seconds(_plan(model, sites, whole))
    layers = 1 + max(site.layer for site in sites)
    shorter = seconds(_plan(model, sites, whole | {site.key: [] for site in sites if site.layer >= (layers + 1) // 2}))
    of_layer = {phase: (dense[phase] - shorter[phase]) / (layers // 2) for phase in PHASES}
    curves = {phase: {} for phase in PHASES}
    for shape, widest in widest_sites(sites).items():
        of_shape = [site for site in sites if shape_of(site) == shape]
        levels = levels_of(widest, torch.zeros(widest.num_units, dtype=torch.float32), config)
        chosen = {len(levels[round(place)]) for place in torch.linspace(0, len(levels) - 1, widths).tolist()}
        saved = {widest.num_units: dict.fromkeys(PHASES, 0.0)}
        for width in sorted(chosen, reverse=True):
            kept = {site.key: _first_units(site, width) for site in of_shape}
            times = seconds(_plan(model, sites, whole | kept))
            saved[width] = {phase: (dense[phase] - times[phase]) / len(of_shape) for phase in PHASES}
        # A layer with attention must be left.
        gone = of_shape[:-1] if widest.kind == "attention" else of_shape
        times = seconds(_plan(model, sites, whole | {site.key: [] for site in gone}))
        for phase in PHASES:
            by_width = {width: of_phase[phase] for width, of_phase in saved.items()}
            if times is None:
                narrow, wider = sorted(by_width)[:2]
                slope = (by_width[narrow] - by_width[wider]) / (wider - narrow)
                whole_site = by_width[narrow] + slope * narrow
            else:
                whole_site = (dense[phase] - times[phase]) / len(gone)
            curves[phase][shape] = [(0, 0.0), *((width, whole_site - by_width[width]) for width in sorted(by_width))]
    phases = {}
    for phase in PHASES:
        latencies = Latencies(tokens[phase], dense[phase], 0.0, curves[phase])
        sublayers = sum(map(latencies.seconds, sites)) / layers
        phases[phase] = replace(latencies, layer_seconds=max(0.0, of_layer[phase] - sublayers))
    here = circumstances(model, widest_sites(sites), config)
    return LatencyTable(phases, {**here, "runtime": "llama.cpp", "machine": machine})


def _plan(model, sites, kept):
    return PruningPlan(kept, {site.key: site.num_units for site in sites}, model.config.model_type, "query_head")


def _first_units(site, width):
    per_group = site.num_units // site.num_groups
    return [group * per_group + unit for group in range(site.num_groups) for unit in range(width // site.num_groups)]


class LlamaCpp:
    """Times models in llama.cpp: the median over repeated requests of what its server measures."""

    def __init__(self, model, tokenizer, options):
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self._tokens = {"prefill": options.tokens, "decode": options.context or options.tokens}

    @property
    def tokens(self):
        """Tokens of the prompt, and in the KV cache, by phase."""
        return self._tokens

    @property
    def machine(self):
        """The circumstances that the table tells."""
        return {
            "device": f"cpu {platform.machine()}",
            "threads": self._options.threads,
            "dtype": self._options.dtype,
            "xllamacpp": version("xllamacpp"),
        }

    def seconds(self, plan):
        """Return the seconds of a plan's model by phase; `None` where llama.cpp cannot hold it."""
        model = self._model
        if any(plan.removed(key) for key in plan.kept):
            pruner = FwdPruner(self._model, self._tokenizer)
            pruner.prune(plan=plan, reconstruction="none", inplace=False)
            model = pruner.model
        with tempfile.TemporaryDirectory() as folder:
            try:
                file = export_gguf(model, self._tokenizer, Path(folder) / "model.gguf", dtype=self._options.dtype)
            except ValueError as error:
                print(f"Not in llama.cpp: {error}", file=sys.stderr)
                return None
            with served(file, max(self._tokens.values()) + 64, self._options.threads) as complete:
                times = {
                    "prefill": [complete(self._tokens["prefill"], 1)["prompt_ms"] for _ in self._repeats()],
                    "decode": [
                        complete(self._tokens["decode"], 16)["predicted_per_token_ms"] for _ in self._repeats()
                    ],
                }
        # The first request warms up.
        medians = {phase: statistics.median(taken[1:]) / 1e3 for phase, taken in times.items()}
        print({phase: round(1e3 * taken, 3) for phase, taken in medians.items()}, "ms", flush=True)
        return medians

    def _repeats(self):
        return range(self._options.repeats + 1)


@contextlib.contextmanager
def served(file, context, threads):
    """Serve a file in this process; yields a function of numbers of prompt and new tokens that returns its timings."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.cpuparams.n_threads, parameters.verbosity = context, threads, 0
    server = xllamacpp.Server(parameters)

    def complete(prompt, new):
        body = {
            "prompt": [1 + number % 200 for number in range(prompt)],
            "n_predict": new,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        request = urllib.request.Request(f"{server.listening_address}/completion", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read())["timings"]

    # A server that ends before its loop has started never ends. An answer shows that the loop runs.
    complete(1, 1)
    yield complete


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder or repository of the dense model.")
    parser.add_argument("output", type=Path, help="File to write.")
    parser.add_argument("--dtype", default="q8_0", help="Dtype of the GGUF files (default: q8_0).")
    parser.add_argument("--tokens", type=int, default=512, help="latency_tokens of the requests (default: 512).")
    parser.add_argument("--context", type=int, help="latency_context of the requests (default: as --tokens).")
    parser.add_argument("--widths", type=int, default=4, help="Widths of every kind of sublayer (default: 4).")
    parser.add_argument("--repeats", type=int, default=5, help="Requests per model (default: 5).")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="Threads (default: all processors).")
    options = parser.parse_args(argv)
    if options.output.exists():
        parser.error(f"{options.output} exists; name another file, or delete it.")
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    server = LlamaCpp(model, AutoTokenizer.from_pretrained(options.model), options)
    table_of(model, server.seconds, server.machine, server.tokens, options.widths).save(options.output)


if __name__ == "__main__":
    main()
