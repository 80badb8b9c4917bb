"""Prune tiny models in every process of a run, each in every way, and write what each process ended with.

accelerate launch --num_processes 2 prune_in_ranks.py OUTPUT
"""

import json
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny
import tiny_mixtures
from accelerate import cpu_offload

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.files import save_tensors_atomically
from optimum_fwdprune.loading.offloading import read_parameter
from optimum_fwdprune.planning import duration, timing
from optimum_fwdprune.runs import ranks


# Name -> fields of a request. Batches of a size that no number of processes divides the windows by.
CASES = {
    "wanda_sp": {"reconstruction": "none"},
    "flap": {"method": "flap", "scope": "global"},
    "flap_padded": {"method": "flap"},
    "flap_few_windows": {"method": "flap"},
    "mini_llm_weights": {"method": "mini_llm", "draws": 7, "windows_per_draw": 2, "reconstruction": "none"},
    "mini_llm_units": {"method": "mini_llm", "perturb": "units", "draws": 12, "stop_after": 5, "scope": "global"},
    "policy_gradient_ratio": {"method": "policy_gradient", "steps": 4, "learning_rate": 0.1},
    "policy_gradient_unit": {"method": "policy_gradient", "steps": 4, "parametrization": "unit", "antithetic": True},
    "search": {"scope": "search", "search_windows": 120, "budget": "joint"},
    "independent": {"reconstruction_order": "independent"},
    "sequential_dense": {"reconstruction_target": "dense"},
    "sources": {"refit_sources": True, "kinds": ["mlp"], "sparsity": 0.3},
    "sequential_layer": {"reconstruction_target": "layer"},
    "self": {"calibration": "self", "n_samples": 19, "seq_len": 12, "batch_size": 2, "reconstruction": "none"},
    "builtin": {"calibration": "builtin", "n_samples": 8, "seq_len": 12, "reconstruction": "none"},
    "offloaded": {"reconstruction_order": "independent"},
    "experts": {"method": "reap", "kinds": ["expert"], "reconstruction": "least_squares"},
    "block_influence": {"method": "block_influence", "kinds": ["sublayer"], "sparsity": 0.5},
    "removal_loss": {"method": "removal_loss", "kinds": ["sublayer"], "sparsity": 0.5, "removal_windows": 16},
    "gaps": {"method": "block_influence", "kinds": ["layer"], "reconstruction_order": "independent"},
    "speedup": {"target_speedup": 1.1, "latency_tokens": 16, "scope": "global", "reconstruction": "none"},
}


def another_clock(runs, repeats, device):
    """What a layer holds is what it takes, by a clock that runs otherwise in every process: the main one's counts."""
    counted = tiny.counted_seconds(runs, repeats, device)
    return [seconds * (1 + ranks.rank() * number) for number, seconds in enumerate(counted)]


RESUMED = ["mini_llm_units", "policy_gradient_ratio", "search", "sequential_dense", "sources", "self", "offloaded"]


def cases_in(processes):
    """The cases that run: all of them in two processes, and one of each way to share work in more."""
    few = ["flap_few_windows", "mini_llm_units", "sequential_dense", "sources", "offloaded", "removal_loss", "gaps"]
    return list(CASES) if processes == 2 else few


def resumed_in(processes):
    """The cases that go on: all of them in two processes, and one of each kind of state in more."""
    return RESUMED if processes == 2 else ["mini_llm_units", "sequential_dense", "offloaded"]


def dataset_of(name):
    """Calibration of a case: 16 windows of 24 (96 for sources), 16 of which two hold nothing but padding, or two."""
    if name in ("self", "builtin"):
        return None
    # Sources need more for what is fitted to hold on windows that were kept out.
    count = 96 if name == "sources" else 16
    tokens = torch.randint(0, tiny.VOCAB, (count, 24), generator=torch.Generator().manual_seed(1))
    if name == "flap_padded":
        mask = torch.ones_like(tokens)
        mask[1::2, 20:] = 0
        mask[:2] = 0
        return {"input_ids": tokens, "attention_mask": mask}
    return tokens[:2] if name == "flap_few_windows" else tokens


def run(name, **fields):
    """Return a pruner that has pruned, and how many windows went through the last layer of the dense model."""
    model = tiny_mixtures.make_mixture("mixtral") if name == "experts" else tiny.make_model("llama_gqa_biases")
    pruner = FwdPruner(model, tiny.make_tokenizer())
    if name == "offloaded":
        cpu_offload(pruner.model, torch.device("cpu"))
    passed = []
    layer = pruner.model.model.layers[-1]
    layer.register_forward_hook(lambda _module, _args, output: passed.append(len(output)))
    share = {} if "target_speedup" in CASES[name] else {"sparsity": 0.4}
    request = {**share, "seed": 3, "batch_size": 3, "attention_unit": "kv_group", **CASES[name], **fields}
    pruner.prune(tiny.request(**request), dataset_of(name))
    return pruner, sum(passed)


def main(output):
    """Run every case and write plans, scores and weights of this process."""
    folder = output / str(ranks.rank())
    folder.mkdir(parents=True)
    timing.median_seconds = another_clock
    # Only the process that shows progress estimates the time of a run.
    duration.FEWEST_PRODUCTS = 0
    # What only the main process does waits for no other.
    assert ranks.from_main(lambda: [float(ranks.summed(torch.ones(1))), len(ranks.own(range(9)))]) == [1.0, 9]
    assert ranks.from_main(lambda: list(ranks.gathered(torch.ones(2)).shape)) == [1, 2]
    passed = {}
    for name in cases_in(ranks.world_size()):
        torch.manual_seed(ranks.rank())
        pruner, passed[name] = run(name)
        pruner.plan.save(folder / f"{name}.json")
        pruner.scores.save(folder / f"{name}.safetensors")
        weights = {each: read_parameter(pruner.model, each) for each, _ in pruner.model.named_parameters()}
        save_tensors_atomically(folder / f"{name}.weights", weights, {})
    for name in resumed_in(ranks.world_size()):
        # The second time there is nothing left to measure.
        for time in ("first", "again"):
            state = {"resume": str(output / "state" / name), "resume_seconds": 0.0}
            pruner, passed[f"{name} {time}"] = run(name, **state)
            pruner.plan.save(folder / f"{name} {time}.json")
    (folder / "passed.json").write_text(json.dumps(passed))
    pruner.save_pretrained(output / "saved")
    # All are there once any of them goes on.
    assert (output / "saved" / "config.json").exists()
    try:
        pruner.save_pretrained(output / "saved")
    except Exception as error:
        (folder / "refusal.json").write_text(json.dumps(f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
