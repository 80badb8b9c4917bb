"""Whether a change of the code leaves plans, scores and weights as they were, to the bit.

    python benchmarks/same_results.py before.json   # writes digests, about a minute
    (change the code)
    python benchmarks/same_results.py before.json   # compares with them, and ends with 1 where a digest differs

Every method, with every reconstruction and scope, on tiny models of three layouts, in memory and with `low_memory`.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from optimum_fwdprune import FwdPruner


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import tiny


KINDS = ["attention", "mlp"]
METHODS = ("flap", "magnitude", "mini_llm", "policy_gradient", "random", "taylor", "wanda_sp")
# A few steps or draws show as well as many that nothing changed.
SHORT = {"policy_gradient": {"steps": 4}, "mini_llm": {"draws": 3}}
WINDOWS = {"n_samples": 12, "seq_len": 24}


def requests():
    """Yield the fields of every request."""
    for method in METHODS:
        for reconstruction in ("none", "bias", "least_squares"):
            for scope in ("layer", "global"):
                own = dict(SHORT.get(method, {}))
                if method == "policy_gradient" and scope == "layer":
                    own["parametrization"] = "unit"
                yield {"method": method, "reconstruction": reconstruction, "scope": scope, "kinds": KINDS, **own}
    refitted = {"method": "wanda_sp", "reconstruction": "least_squares", "kinds": KINDS}
    yield {**refitted, "reconstruction_target": "layer"}
    yield {**refitted, "reconstruction_order": "independent"}
    yield {"method": "mini_llm", "draws": 2, "kinds": KINDS, "gradient": "exact"}
    yield {**refitted, "refit_sources": True}
    yield {**refitted, "scope": "search", "search_windows": 60}
    yield {**refitted, "rounds": 2}
    yield {**refitted, "attention_unit": "kv_group"}
    yield {"method": "wanda_sp", "layout": "stock"}
    yield {**refitted, "target_parameters": 60000}
    yield {"method": "wanda_sp", "reconstruction": "bias", "scope": "search", "search_windows": 60, "kinds": KINDS}
    yield {"method": "wanda_sp"}
    yield {"method": "taylor", "multiple_of": 4}


def digest(tensors):
    """Return a digest of named tensors."""
    content = hashlib.sha256()
    for name, tensor in sorted(tensors):
        content.update(name.encode())
        content.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()[:16]


def digests_of(dense, fields, low_memory, folder):
    """Return digests of plan, scores and reloaded weights, or the words in which a request is refused."""
    torch.manual_seed(3)
    tokens = torch.randint(3, tiny.VOCAB, (12, 24))
    share = {} if "target_parameters" in fields else {**WINDOWS, "sparsity": 0.3}
    try:
        pruner = FwdPruner.from_pretrained(dense, low_memory=low_memory)
        pruner.prune(dataset=tokens, **share, **fields)
        pruner.save_pretrained(folder)
    except ValueError as error:
        return [f"{type(error).__name__}: {error}"[:92]]
    kept = [[list(site), list(units)] for site, units in sorted(pruner.plan.kept.items())]
    plan = hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]
    scores = digest((".".join(map(str, site)), values) for site, values in pruner.scores.values.items())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return [plan, scores, digest(model.named_parameters())]


def main(file):
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as parent:
        for layout in ("llama_gqa_biases", "opt_pre_norm", "bloom"):
            dense = Path(parent) / layout
            tiny.make_model(layout).save_pretrained(dense)
            tiny.make_tokenizer().save_pretrained(dense)
            for number, fields in enumerate(requests()):
                few = layout != "llama_gqa_biases" and fields.get("scope") == "global"
                if few and fields["reconstruction"] != "least_squares":
                    continue
                for low_memory in (False, True):
                    name = f"{layout} {json.dumps(fields)} low_memory={low_memory}"
                    folder = dense / f"pruned-{number}-{low_memory}"
                    results[name] = digests_of(dense, fields, low_memory, folder)
    if not file.exists():
        file.write_text(json.dumps(results, indent=1))
        print(f"{len(results)} requests written to {file}")
        return 0
    before = json.loads(file.read_text())
    different = [name for name, digests in before.items() if results.get(name) != digests]
    for name in different:
        print(f"{name}: {before[name]} before, {results.get(name)} now")
    print(f"{len(before)} requests, {len(different)} differ")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
