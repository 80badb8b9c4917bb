"""What documentation and examples meet when a test runs them: tiny models by the names of real ones, little work."""

import shutil

import tiny
import tiny_mixtures
from datasets import Dataset

from optimum_fwdprune import FwdPruner, PruningConfig, RecoveryArguments
from optimum_fwdprune.data import texts
from optimum_fwdprune.planning import timing
from optimum_fwdprune.request import config as configuration
from optimum_fwdprune.request import options, registry


# A checkpoint names a folder that it was made from by its last part.
DENSE = ("MODEL", "dense", "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M")
MIXTURE = "Qwen/Qwen3-30B-A3B"
CODER = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
# The same requests, made smaller where they would take long.
SMALLER = {"n_samples": 8, "seq_len": 32, "batch_size": 8, "steps": 3, "draws": 3, "search_windows": 20}


def save_checkpoints(folder, tokenizer):
    """Save a dense and a pruned checkpoint into a folder."""
    model = tiny.make_model("llama_gqa_biases", max_position_embeddings=2048, attention_bias=False, mlp_bias=False)
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    mixture = tiny_mixtures.make_mixture("qwen3_moe", max_position_embeddings=2048, eos_token_id=1, bos_token_id=0)
    mixture.save_pretrained(folder / "mixture")
    tokenizer.save_pretrained(folder / "mixture")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2}
    coder = tiny.make_model("qwen2", max_position_embeddings=2048, **shape)
    coder.save_pretrained(folder / "coder")
    tokenizer.save_pretrained(folder / "coder")
    pruner = FwdPruner.from_pretrained(folder / "dense")
    pruner.prune(tiny.request(method="random", scope="global", sparsity=0.3, kinds=["mlp"], multiple_of=4))
    pruner.save_pretrained(folder / "pruned")


def install(monkeypatch, folder, checkpoints):
    """Go to a folder with the dense models; make requests small, a text of every dataset, and the clock count."""
    monkeypatch.chdir(folder)
    for name in DENSE:
        shutil.copytree(checkpoints / "dense", name)
    shutil.copytree(checkpoints / "mixture", MIXTURE)
    shutil.copytree(checkpoints / "coder", CODER)
    # A block's own method would be known to the next one.
    known = dict(registry.METHODS)
    monkeypatch.setattr(registry, "METHODS", known)
    monkeypatch.setattr(configuration, "METHODS", known)
    monkeypatch.setattr(options, "METHODS", known)
    monkeypatch.setattr(texts, "load_rows", wikitext)
    monkeypatch.setattr("optimum_fwdprune.data.load_calibration.load_rows", wikitext)
    make_smaller(monkeypatch, PruningConfig, SMALLER)
    make_smaller(monkeypatch, RecoveryArguments, {"max_steps": 2})
    # How long a layer takes is what it multiplies: a busy machine changes no plan.
    monkeypatch.setattr(timing, "median_seconds", tiny.counted_seconds)


def wikitext(path=None, name=None, split="train"):
    """In the place of datasets of the Hub."""
    words = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog")
    rows = [" ".join(words[number * place % 9] for place in range(1, 60)) for number in range(1, 60)]
    return Dataset.from_dict({"text": rows})


def make_smaller(monkeypatch, config_class, limits):
    settle = config_class.__post_init__

    def settle_smaller(self):
        # A budget in tokens is small in the documentation.
        for name, most in limits.items() if getattr(self, "tokens", None) is None else ():
            value = getattr(self, name, None)
            if value is not None and (isinstance(value, str) or not 0 < value <= most):
                setattr(self, name, most)
        settle(self)

    monkeypatch.setattr(config_class, "__post_init__", settle_smaller)
