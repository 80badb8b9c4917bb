"""Layers of Qwen3-30B-A3B's shape that lose half of their experts on disk: seconds, peak memory, and passes."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from large_model import random_weights, watched_memory
from study import table
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.data.calibration import Calibration
from optimum_fwdprune.files import save_weights_atomically, write_text_atomically
from optimum_fwdprune.forward.layerwise import LayerRunner
from optimum_fwdprune.loading.offloading import resident


TOKENS, BATCH, VOCABULARY = 128, 8, 4096
SHAPE = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
REQUESTS = {"as cut": {"reconstruction": "none"}, "least squares": {"reconstruction": "least_squares"}}
STAGES = ("load", "score", "reconstruct", "surgery", "verify", "save")
GIB = 2**30


def measure_stack(script, options):
    """Write the checkpoint, prune it once per request, each in a process of its own, and return a table.

    Args:
        script (`str`): the script that calls [`prune_stack`] with `--prune_stack`.
        options (`Namespace`): options of the command line.
    """
    layers, parent = options.stack, Path(options.folder)
    needed, free = (4 * layers + 2) * 1.25e9, shutil.disk_usage(parent).free
    if free < needed:
        sys.exit(f"{parent.absolute()} has {free / 1e9:.0f} GB free, and this takes {needed / 1e9:.0f}. Name another.")
    body = []
    with tempfile.TemporaryDirectory(prefix="fwdprune-stack-", dir=parent) as folder:
        sizes = write_stack(Path(folder) / "dense", layers)
        for name in REQUESTS:
            arguments = [name, str(Path(folder) / "dense"), str(Path(folder) / "pruned")]
            command = [sys.executable, script, "--stack_windows", str(options.stack_windows)]
            ran = subprocess.run(
                [*command, "--prune_stack", *arguments], stdout=subprocess.PIPE, text=True, check=True
            )
            figures = json.loads(ran.stdout.splitlines()[-1])
            shutil.rmtree(Path(folder) / "pruned")
            body.append(
                [
                    name,
                    *(f"{figures['peaks'][kind] / GIB:.2f}" for kind in ("rss", "anonymous")),
                    f"{figures['passes']:.2f}",
                    f"{figures['one_pass']:.0f}",
                    *(f"{figures['seconds'].get(stage, 0):.0f}" for stage in STAGES),
                ]
            )
            print(name, json.dumps(figures), flush=True)
    title = f"{layers} layers of {sizes['layer'] / GIB:.2f} GiB, {sizes['rest'] / GIB:.2f} GiB of other weights, "
    title += f"{options.stack_windows * TOKENS} tokens:\n\n"
    header = ["reconstruction", "peak GiB", "of which not mapped files", "passes", "one pass, s"]
    return title + table([*header, *(f"{stage}, s" for stage in STAGES)], body)


def write_stack(folder, layers):
    """Write random weights, one file per layer with one tensor per expert, and return the bytes of a layer and of all
    weights outside of layers."""
    config = Qwen3MoeConfig(**SHAPE, num_hidden_layers=layers, vocab_size=VOCABULARY, dtype="bfloat16")
    with torch.device("meta"):
        parameters = dict(Qwen3MoeForCausalLM(config).named_parameters())
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    parts, weight_map, sizes = {}, {}, {"layer": 0, "rest": 0}
    for name, parameter in parameters.items():
        number = int(name.split(".")[2]) + 1 if name.startswith("model.layers.") else 0
        parts.setdefault(number, {}).update(_stored_shapes(name, parameter.shape))
    generator = torch.Generator().manual_seed(0)
    for number, shapes in sorted(parts.items()):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: random_weights(shape, generator) for name, shape in shapes.items()}
        save_weights_atomically(folder / file, tensors)
        weight_map |= dict.fromkeys(shapes, file)
        sizes["layer" if number else "rest"] = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {}, "weight_map": weight_map}
    write_text_atomically(folder / "model.safetensors.index.json", json.dumps(index))
    return sizes


def _stored_shapes(name, shape):
    """Return the shapes of a parameter as published checkpoints store it: those of experts one by one."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: shape}
    path, _, own_name = name.rpartition(".")
    experts, rows, columns = shape
    halves = ("gate_proj", "up_proj") if own_name == "gate_up_proj" else ("down_proj",)
    rows //= len(halves)
    return {f"{path}.{expert}.{half}.weight": (rows, columns) for expert in range(experts) for half in halves}


def prune_stack(name, folder, output, windows):
    """Prune in this process, and print what it took as JSON."""
    calls, seconds = _counted_calls(), {}
    with watched_memory() as peaks:
        start = time.perf_counter()
        pruner = FwdPruner.from_pretrained(folder, low_memory=True, offload_folder=Path(output).parent)
        seconds["load"] = time.perf_counter() - start
        ids = torch.randint(VOCABULARY, (windows, TOKENS), generator=torch.Generator().manual_seed(1))
        one_pass = _seconds_of_a_pass(pruner.model, ids)
        calls.clear()
        pruner.prune(None, ids, kinds=["expert"], method="reap", sparsity=0.5, batch_size=BATCH, **REQUESTS[name])
        layers = pruner.model.config.num_hidden_layers
        start = time.perf_counter()
        pruner.save_pretrained(output)
        seconds |= pruner.report.seconds | {"save": time.perf_counter() - start}
    # Every token runs through the experts that its router chooses.
    passes = sum(calls) / (ids.numel() * SHAPE["num_experts_per_tok"] * layers)
    details = {"masked_difference": pruner.report.masked_difference, "bytes": pruner.report.bytes_after}
    print(json.dumps({"peaks": peaks, "passes": passes, "one_pass": one_pass, "seconds": seconds, **details}))


@torch.no_grad()
def _seconds_of_a_pass(model, ids):
    """Return the seconds that the dense layers take for the tokens, each in memory once, without reading them."""
    runner, seconds = LayerRunner(model), 0.0
    batches = runner.batches(Calibration(ids), BATCH)
    hidden = [runner.embed(batch) for batch in batches]
    for number, layer in enumerate(runner.layers):
        with resident(layer):
            start = time.perf_counter()
            hidden = [runner.run(number, batch, states) for batch, states in zip(batches, hidden)]
            seconds += time.perf_counter() - start
    return seconds


def _counted_calls():
    """Return a list to which every call of a module with experts adds its number of pairs of a token and an expert."""
    calls, forward = [], Qwen3MoeExperts.forward

    def counted(self, hidden_states, top_k_index, top_k_weights):
        calls.append(top_k_index.numel())
        return forward(self, hidden_states, top_k_index, top_k_weights)

    Qwen3MoeExperts.forward = counted
    return calls
