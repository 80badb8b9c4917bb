"""Memory that `target_memory` predicts, compared with the measured peak of a prefill and a decoding step.

    python benchmarks/memory.py MODEL --targets 240MB 220MB 200MB --context_tokens 2048

Every target is pruned with magnitudes, since the weights do not matter, and measured in a process of its own.
"""

import argparse
import json
import subprocess
import sys

import torch

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.evaluation.memory import PeakMemory
from optimum_fwdprune.evaluation.speed import _generate
from optimum_fwdprune.request.sizes import bytes_of


REQUEST = {"method": "magnitude", "reconstruction": "none", "skip_layers": []}


@torch.no_grad()
def measured(arguments, target):
    """Prune to a target; return the predicted and the measured bytes."""
    pruner = FwdPruner.from_pretrained(arguments.model, dtype=arguments.dtype)
    request = {"context_tokens": arguments.context_tokens, "serving_batch": arguments.serving_batch}
    model = pruner.prune(target_memory=bytes_of(target), **request, **REQUEST)
    predicted = pruner.plan.metadata["memory"]
    prompts = torch.zeros(arguments.serving_batch, arguments.context_tokens, dtype=torch.int64)
    # A short prompt first: libraries keep buffers from their first call.
    _generate(model, prompts[:, :8], 1)
    with PeakMemory(model.device) as peak:
        _generate(model, prompts, 1)
    return predicted, sum(predicted.values()), predicted["weights"] + peak.bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--context_tokens", type=int, default=2048)
    parser.add_argument("--serving_batch", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    if len(arguments.targets) > 1:
        for target in arguments.targets:
            others = [word for word in sys.argv[1:] if word not in arguments.targets and word != "--targets"]
            subprocess.run([sys.executable, __file__, *others, "--targets", target], check=True)
        return
    parts, predicted, peak = measured(arguments, arguments.targets[0])
    ratio = predicted / peak - 1
    print(
        json.dumps({"target": arguments.targets[0], **parts, "predicted": predicted, "measured": peak, "off": ratio})
    )


if __name__ == "__main__":
    main()
