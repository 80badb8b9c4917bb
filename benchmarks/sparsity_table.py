"""Writes docs/concepts/sparsity.md: what a sparsity means for known models, worked out from their configs.

    python benchmarks/sparsity_table.py

Models are made without memory, so that a model of 14 billion parameters takes no longer than a small one.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pages
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config
from transformers.utils import logging

from optimum_fwdprune import PruningConfig, find_sites
from optimum_fwdprune.allocation.budgets import removal_budget
from optimum_fwdprune.planning.settling import kept_by_equal_scores, settle


PAGE = Path(__file__).parent.parent / "docs" / "concepts" / "sparsity.md"
SHARES = (0.2, 0.3, 0.4, 0.5)
WORKED_EXAMPLE = "LLaMA-2-7B"


@dataclass(frozen=True)
class Sizes:
    """The sizes in the published config of a model."""

    config_class: type
    hidden: int
    mlp: int
    layers: int
    heads: int
    head_dim: int
    kv_heads: int
    vocabulary: int
    tied: bool

    @property
    def config(self):
        return self.config_class(
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
        )


MODELS = {
    "SmolLM2-135M": Sizes(LlamaConfig, 576, 1536, 30, 9, 64, 3, 49_152, True),
    "Gemma 3 270M": Sizes(Gemma3TextConfig, 640, 2048, 18, 4, 256, 1, 262_144, True),
    "Qwen2.5-0.5B": Sizes(Qwen2Config, 896, 4864, 24, 14, 64, 2, 151_936, True),
    "LLaMA-2-7B": Sizes(LlamaConfig, 4096, 11_008, 32, 32, 128, 32, 32_000, False),
    "Llama-3-8B": Sizes(LlamaConfig, 4096, 14_336, 32, 32, 128, 8, 128_256, False),
    "Qwen2.5-14B": Sizes(Qwen2Config, 5120, 13_824, 48, 40, 128, 8, 152_064, False),
}

INTRODUCTION = """# What a sparsity means for your model

*This page is written by `benchmarks/sparsity_table.py` from the configs of the models.*

`sparsity` is the share of the **prunable** parameters that is removed. Prunable are the parameters that
[units](terms.md#unit) own: attention heads and MLP channels. Embeddings, norms, the language model head, and the keys
and values of grouped-query attention are not prunable. Two questions follow from this definition:

- **How much of the whole model is removed?** Less than `sparsity`, and much less with large embeddings.
- **How much does each pruned layer lose?** More than `sparsity`. By default only MLP channels are removed, and the
  first and last two layers stay as they are. The other MLPs lose what the heads and these layers keep.

To set the size of the whole model, use `target_parameters` or `target_bytes` instead of `sparsity`.
"""
RULES = """
## When the defaults give way

A model loses at most 90 % of the channels of a layer by default. A larger sparsity first prunes the first and last
layers too, then the query heads. Whole layers are removed only if heads and channels cannot meet the budget. A log
message announces every step. The table shows the smallest sparsity, in whole percent, at which each step is taken.

"""
END = """
Options that you set yourself (`skip_layers`, `kinds`) never give way. A request that they do not allow is refused, and
the error names the largest possible sparsity.

`prune` prints the sizes and the loss of each layer before any work starts, and the report has them afterwards:

```python
pruner.prune(sparsity=0.3)
print(pruner.report)
```
"""


def files():
    """The page, by its path."""
    return {PAGE: page()}


def page():
    """The whole page, as Markdown."""
    logging.set_verbosity_error()
    models = {name: KnownModel(sizes) for name, sizes in MODELS.items()}
    worked = worked_example(WORKED_EXAMPLE, models[WORKED_EXAMPLE])
    return "".join([INTRODUCTION, worked, whole_models(models), layers(models), RULES, steps(models), END])


class KnownModel:
    """A model of known sizes, without memory, and what requests remove from it."""

    def __init__(self, sizes):
        self.sizes = sizes
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(sizes.config, dtype=torch.bfloat16)
        self.sites = find_sites(model)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.prunable = sum(site.num_parameters for site in self.sites)

    def settled(self, sparsity):
        def budget_of(config):
            return config, removal_budget(config, self.sites, self.parameters, 2 * self.parameters)

        return settle(self.sites, PruningConfig(sparsity=sparsity), budget_of)

    @cached_property
    def kept(self):
        """The units that every site keeps, by sparsity."""
        return {share: kept_by_equal_scores(self.sites, *self.settled(share)) for share in SHARES}

    def removed(self, sparsity):
        kept = self.kept[sparsity]
        return sum((site.num_units - len(kept[site.key])) * site.unit_parameters for site in self.sites)

    def lost_channels(self, sparsity):
        """The share of the channels that the pruned layers lose, and the number of these layers."""
        kept = self.kept[sparsity]
        lost = [1 - len(kept[site.key]) / site.num_units for site in self.sites if site.kind == "mlp"]
        pruned = [share for share in lost if share]
        return sum(pruned) / len(pruned), len(pruned)

    def smallest(self, given_way):
        """The smallest sparsity, in whole percent, at which the settled request has given way."""
        return 1 + bisect_left(range(1, 96), True, key=lambda share: given_way(self.settled(share / 100)[0]))


def worked_example(name, model):
    sizes, sparsity = model.sizes, 0.3
    mlp = sum(site.num_parameters for site in model.sites if site.kind == "mlp")
    attention = model.prunable - mlp
    left = model.parameters - model.removed(sparsity)
    removed, (lost, pruned) = model.removed(sparsity), model.lost_channels(sparsity)
    lines = [
        f"\n## {name} at a sparsity of {percent(sparsity)}, step by step\n",
        "| step | parameters |\n|---|---|",
        f"| MLPs: {product(f'{sizes.layers} layers', '3 matrices', sizes.hidden, sizes.mlp)} | {mlp:,} |",
        f"| heads: {product(f'{sizes.layers} layers', '4 matrices', sizes.hidden, sizes.hidden)} | {attention:,} |",
        f"| prunable: both together | {model.prunable:,} |",
        f"| removed: {percent(removed / model.prunable, 1)} of these | {removed:,} |",
        f"| the whole model before | {model.parameters:,} |",
        f"| the whole model after, {percent(removed / model.parameters, 1)} smaller | {left:,} |",
        f"\nThe MLPs of {pruned} of {sizes.layers} layers lose all of this: {removed:,} of "
        f"{mlp * pruned // sizes.layers:,} parameters.\nEach of them therefore loses {percent(lost)} of its channels. "
        "Widths are rounded to multiples of 64.\n",
    ]
    return "\n".join(lines)


def whole_models(models):
    head = " | ".join(f"`sparsity={share}`" for share in SHARES)
    lines = [
        "\n## Size of the whole model\n",
        "The parameters that are left, and the share of all parameters that is removed:\n",
        f"| model | parameters | prunable | {head} |\n|---|---|---|{'---|' * len(SHARES)}",
    ]
    for name, model in models.items():
        removed = map(model.removed, SHARES)
        cells = [f"{millions(model.parameters - one)} (-{percent(one / model.parameters)})" for one in removed]
        prunable = percent(model.prunable / model.parameters)
        lines.append(f"| {name} | {millions(model.parameters)} | {prunable} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def millions(parameters):
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"


def layers(models):
    head = " | ".join(f"`sparsity={share}`" for share in SHARES)
    lines = [
        "\n## What each pruned layer loses\n",
        "The share of its MLP channels, with the default options:\n",
        f"| model | pruned layers | {head} |\n|---|---|{'---|' * len(SHARES)}",
    ]
    for name, model in models.items():
        default = model.lost_channels(SHARES[0])[1]
        cells = []
        for share in SHARES:
            lost, pruned = model.lost_channels(share)
            cells.append(percent(lost) + (f" of {pruned} layers" if pruned != default else ""))
        lines.append(f"| {name} | {default} of {model.sizes.layers} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def steps(models):
    lines = ["| model | first and last layers are pruned too | query heads are pruned too |\n|---|---|---|"]
    for name, model in models.items():
        ends = model.smallest(lambda config: config.skip_layers == [])
        heads = model.smallest(lambda config: "attention" in (config.kinds or ()))
        lines.append(f"| {name} | {ends} % | {heads} % |")
    return "\n".join(lines) + "\n"


def product(*factors):
    return " \N{MULTIPLICATION SIGN} ".join(f"{factor:,}" if isinstance(factor, int) else factor for factor in factors)


def percent(share, digits=0):
    return f"{share:.{digits}%}".replace("%", " %")


if __name__ == "__main__":
    pages.write(files())
