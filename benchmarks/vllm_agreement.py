"""Whether vLLM computes what transformers does, for pruned models of every family.

    python benchmarks/vllm_agreement.py PYTHON_WITH_VLLM

Prunes tiny random models, heads and channels, every layer by another amount, and lets vLLM serve them by its
Transformers modeling backend: once as remote code, otherwise through this package's entry point, which must be
installed beside vLLM. Compares greedy tokens and the likeliest log-probabilities in float32; `make vllm` installs what
it needs on a CPU. Ends with an error where a family differs that is not known to.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny
from study import table

from optimum_fwdprune import FwdPruner, PruningConfig


# vLLM's attention on CPUs knows heads of 32 features and more.
LLAMA = {"head_dim": 32, "max_position_embeddings": 256}
WIDE = {"hidden_size": 192}
CASES = {
    "llama, query heads": ("llama_gqa_biases", LLAMA, {}),
    "llama, KV groups": ("llama_gqa_biases", LLAMA, {"attention_unit": "kv_group"}),
    "llama, added biases": (
        "llama_gqa_biases",
        {**LLAMA, "attention_bias": False, "mlp_bias": False},
        {"method": "flap", "budget": "joint", "reconstruction": "bias"},
    ),
    "mistral": ("mistral_sliding_window", {**LLAMA, "sliding_window": None}, {}),
    "qwen2": ("qwen2", {**WIDE, "max_position_embeddings": 256}, {}),
    "qwen3": ("qwen3", LLAMA, {"attention_unit": "kv_group"}),
    "opt": ("opt_pre_norm", {**WIDE, "word_embed_proj_dim": 192}, {}),
    "bloom": ("bloom", WIDE, {}),
    "llama, layers removed": ("llama_gqa_biases", LLAMA, {"kinds": ["layer"], "scope": None}),
    "llama, sublayers removed": ("llama_gqa_biases", LLAMA, {"kinds": ["sublayer"], "scope": None}),
    "llama, on two devices": (
        "llama_gqa_biases",
        {**LLAMA, "num_attention_heads": 12, "num_key_value_heads": 6},
        {"attention_unit": "kv_group", "tensor_parallel": 2},
    ),
}
REMOTE = "llama, query heads"
# transformers' BLOOM takes no positions, and vLLM's backend asks for them, and for attention in every layer.
REFUSED = {
    "bloom": "Argument position_ids not found",
    "llama, sublayers removed": "does not dispatch through the Transformers attention interface",
}
PROMPT, NEW_TOKENS, LIKELIEST = list(range(10, 20)), 8, 3

SERVE = """
import json, sys

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    folder, output, options = sys.argv[1:]
    options = json.loads(options)
    sampling = SamplingParams(max_tokens=options.pop("new_tokens"), temperature=0, logprobs=options.pop("likeliest"))
    prompt = {"prompt_token_ids": options.pop("prompt")}
    model = LLM(model=folder, dtype="float32", max_model_len=48, enforce_eager=True, **options)
    found = model.generate([prompt], sampling)[0].outputs[0]
    likeliest = [[number, each.logprob] for number, each in found.logprobs[0].items()]
    with open(output, "w") as file:
        json.dump({"tokens": list(found.token_ids), "likeliest": likeliest}, file)
"""


def served(python, folder, remote, devices):
    """What vLLM answers, or the end of what it said."""
    output, script = folder.with_suffix(".json"), folder.with_suffix(".py")
    script.write_text(SERVE)
    options = {"prompt": PROMPT, "new_tokens": NEW_TOKENS, "likeliest": LIKELIEST, "trust_remote_code": remote}
    options["tensor_parallel_size"] = devices
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_PLUGINS": "" if remote else "fwdprune",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [python, script, folder, output, json.dumps(options)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=folder.parent,
    )
    return (json.loads(output.read_text()) if run.returncode == 0 else None), run.stdout + run.stderr


@torch.no_grad()
def compare(name, python, folder):
    """A row of the table, and whether all is as it should be."""
    architecture, changes, fields = CASES[name]
    pruner = FwdPruner(tiny.make_model(architecture, **changes), tiny.make_tokenizer())
    request = {
        "method": "random",
        "kinds": ["attention", "mlp"],
        "reconstruction": "none",
        "scope": "global",
        "sparsity": 0.4,
        "seed": 3,
        **fields,
    }
    model = pruner.prune(PruningConfig(**request), torch.arange(96).view(4, 24)).eval()
    pruner.save_pretrained(folder)
    prompt = torch.tensor([PROMPT])
    tokens = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)[0, len(PROMPT) :]
    logprobs = model(prompt).logits[0, -1].log_softmax(-1)
    answer, said = served(python, folder, name == REMOTE, fields.get("tensor_parallel", 1))
    if answer is None:
        reason = REFUSED.get(name)
        if reason is not None and reason in said:
            return [name, "refused by vLLM", reason], True
        return [name, "failed", " ".join(said.split())[-300:]], False
    worst = max(abs(value - float(logprobs[number])) for number, value in answer["likeliest"])
    same = answer["tokens"] == tokens.tolist()
    return [name, "yes" if same else "NO", f"{worst:.1e}"], same and worst < 1e-4


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("python", help="Interpreter of an environment with vLLM and this package.")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [compare(name, args.python, Path(folder) / f"model{i}") for i, name in enumerate(args.cases)]
    print(table(["model", "same greedy tokens", "log-probabilities differ by"], [row for row, _ in found]))
    if not all(good for _, good in found):
        sys.exit("vLLM differs from transformers.")


if __name__ == "__main__":
    main()
