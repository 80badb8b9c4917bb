"""Memory that `target_memory` predicts, compared with the measured peak of a generation.

    python benchmarks/memory.py MODEL --targets 300MB 260MB 220MB --context_tokens 2048

Every target is pruned with magnitudes, since the weights do not matter, and saved. Another process loads the
checkpoint and generates a token after a prompt of the context's length. Its peak is what its resident size exceeds
that of the same process before it loaded anything. The C library keeps some of the memory that was freed, so that the
peak differs from run to run: every target is measured several times, once more with blocks that are returned at once
(MALLOC_MMAP_THRESHOLD_).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.evaluation.memory import PeakMemory
from optimum_fwdprune.report import render_table
from optimum_fwdprune.request.sizes import bytes_of


REQUEST = {"method": "magnitude", "reconstruction": "none", "skip_layers": []}


def predicted(arguments, target, folder):
    """Prune to a target, save the result, and return the predicted bytes by part."""
    pruner = FwdPruner.from_pretrained(arguments.model, dtype=arguments.dtype)
    request = {"context_tokens": arguments.context_tokens, "serving_batch": arguments.serving_batch}
    pruner.prune(target_memory=bytes_of(target), **request, **REQUEST)
    pruner.save_pretrained(folder)
    return pruner.plan.metadata["memory"]


@torch.no_grad()
def peak(arguments):
    """Print the bytes of this process that loading and generating take."""
    prompts = torch.zeros(arguments.serving_batch, arguments.context_tokens, dtype=torch.int64)
    # Libraries allocate buffers when they are first used, whatever the model is.
    tiny = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1))
    _generate(tiny.to(torch.bfloat16), prompts[:, :64])
    del tiny
    # The context returns free memory to the system before and records the kernel's maximum.
    before = psutil.Process().memory_info().rss
    with PeakMemory(torch.device("cpu")):
        model = AutoModelForCausalLM.from_pretrained(arguments.measured, dtype=arguments.dtype)
        # A file that is mapped into memory takes none until it is read. One value of every page is read.
        for parameter in model.parameters():
            parameter.flatten()[::1024].sum()
    with PeakMemory(torch.device("cpu")) as generation:
        loaded = psutil.Process().memory_info().rss
        _generate(model, prompts)
    print(loaded + generation.bytes - before)


def _generate(model, prompts):
    model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=1, do_sample=False)


def measured(arguments, folder, **environment):
    """Return the peak of a process that loads a checkpoint and generates with it."""
    words = [sys.executable, __file__, folder, "--measured", folder, "--dtype", arguments.dtype]
    sizes = ["--context_tokens", str(arguments.context_tokens), "--serving_batch", str(arguments.serving_batch)]
    done = subprocess.run(
        [*words, *sizes], env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return int(done.stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--targets", nargs="+", default=[])
    parser.add_argument("--context_tokens", type=int, default=2048)
    parser.add_argument("--serving_batch", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measured", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measured:
        peak(arguments)
        return
    rows = []
    for target in arguments.targets:
        with tempfile.TemporaryDirectory() as folder:
            parts = predicted(arguments, target, folder)
            peaks = [measured(arguments, folder) for _ in range(arguments.repeats)]
            returned = measured(arguments, folder, MALLOC_MMAP_THRESHOLD_="65536")
        total = sum(parts.values())
        middle = statistics.median(peaks)
        print(json.dumps({"target": target, **parts, "peaks": peaks, "returned": returned}), flush=True)
        spread = f"{min(peaks) / 1e6:,.0f} to {max(peaks) / 1e6:,.0f}"
        row = [target, f"{total / 1e6:,.0f}", f"{middle / 1e6:,.0f} ({spread})", f"{total / middle - 1:+.1%}"]
        rows.append([*row, f"{returned / 1e6:,.0f}", f"{total / returned - 1:+.1%}"])
    header = ["target", "predicted, MB", "measured (lowest to highest)", "off", "blocks returned", "off"]
    print(render_table(header, rows))


if __name__ == "__main__":
    main()
