"""Writes docs/reference/supported_models.md, what can be pruned of every family and which programs load the result,
and a short form of it into the README.

    python benchmarks/supported_models.py

What a family can lose is read off its layout. What a stock checkpoint holds is worked out from its stock classes. What
a GGUF file holds is declared in architectures/gguf.py, and what vLLM runs is what vllm_agreement.py compares.
"""

import re
import sys
from pathlib import Path

import pages
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging

from optimum_fwdprune.architectures import get_architecture
from optimum_fwdprune.architectures.gguf import REASONS, RULES, layers_without_rope
from optimum_fwdprune.architectures.stock_form import NoStockForm, find_stock_form
from optimum_fwdprune.cutting.form import pruned_config, stays_stock
from optimum_fwdprune.loading.subject import Subject
from optimum_fwdprune.models.families import family_modules
from optimum_fwdprune.models.layout import DecoderLayout
from optimum_fwdprune.request.choices import UnitKind


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny
import tiny_mixtures
import tiny_multimodal
from vllm_agreement import CASES, REFUSED


README = Path(__file__).parent.parent / "README.md"
PAGE = README.parent / "docs" / "reference" / "supported_models.md"
INTRODUCTION = """# Supported models

This page is written by `benchmarks/supported_models.py` from the registry of families. Each column is a way to load a
pruned model. A cell lists what may have been removed from the model:

| letter | what was removed |
|---|---|
| H | heads or KV groups, equally many in every layer |
| C | MLP channels, equally many in every layer |
| U | heads or channels, another number in every layer |
| L | whole layers |
| S | the attention or the MLP of single layers |
| E | experts of a mixture, equally many in every layer |

- The **plugin** is this package beside transformers.
- **Remote code** is `trust_remote_code=True` without this package.
- A [**stock checkpoint**](../how_to/export.md) is loaded by transformers alone, and by programs that load its
  checkpoints.
- A [**GGUF file**](../how_to/gguf.md) is run by llama.cpp.
- [**vLLM**](../how_to/serving.md#vllm) loads the pruned checkpoint itself. Families that were not run there may work.

The tests load tiny models of every family by the plugin, as remote code and as stock checkpoints. For every family
with a GGUF export they run such a file in llama.cpp. Models of other families can be pruned once they are
[declared](../contributing/add_an_architecture.md).
"""
HEAD = """| family | `model_type` | plugin | remote code | stock checkpoint | GGUF | vLLM |
|---|---|---|---|---|---|---|
"""
STOCK_HEADS = "Its stock classes take the width of a head from the number of heads."
STOCK_CHANNELS = "Its stock classes take the number of channels from the hidden size."
LLAMA_HEADS = "llama.cpp takes all heads together to be as wide as the hidden size."
BLOOM_HEADS = "llama.cpp works the ALiBi slopes out of the number of heads."
EXPERTS_EVERYWHERE = "Only of models with experts in every layer that is left."
FIXED_PATTERN = "Only so that every fourth of the layers that are left is one without rotary embeddings."
FIRST_LAYERS = (
    "The first layers, after each of which features of images are added to the residual stream (DeepStack), are not "
    "removed whole. Their attention or their MLP can be removed."
)
NORMALIZED = "Not from models whose layers normalize the residual stream itself."


SHORT_HEAD = """| families | can lose | as a stock checkpoint | as a GGUF file |
|---|---|---|---|
"""
WORDS = {"H": "heads", "C": "channels", "L": "layers", "E": "experts"}


def files():
    """The page and the README with the short form, by path."""
    text = page()
    return {PAGE: text, README: with_short_form(README.read_text(encoding="utf-8"), text)}


def page():
    """The whole page, as Markdown."""
    logging.set_verbosity_error()
    notes = Notes()
    rows = [row(get_architecture(AutoConfig.for_model(model_type)), notes) for model_type in family_modules()]
    return "\n".join([INTRODUCTION, HEAD + "".join(rows), notes.text()])


def with_short_form(readme, page):
    """The text of the README with the short form of a page between its two comments."""
    begin, end = "<!-- supported models -->\n", "\n<!-- end -->"
    return readme[: readme.index(begin) + len(begin)] + short_form(page) + readme[readme.index(end) :]


def short_form(page):
    """A table of the page's families, with one row for all that are alike, without sublayers and footnotes."""
    alike = {}
    row_of_family = r"^\| (.+?) \| `.+?` " + r"\| (.+?) " * 5 + r"\|$"
    for name, plugin, _, stock, gguf, _ in re.findall(row_of_family, page.partition(HEAD)[2], re.MULTILINE):
        alike.setdefault(tuple(map(in_words, (plugin, stock, gguf))), []).append(name.removeprefix("The "))
    rows = sorted(alike.items(), key=lambda row: ("experts" in row[0][0], -len(row[1])))
    return SHORT_HEAD + "".join(f"| {' | '.join([', '.join(names), *cells])} |\n" for cells, names in rows)


def in_words(cell):
    letters = re.sub(r"\[\^\d+\]", "", cell).split()
    words = [WORDS[letter] for letter in letters if letter in WORDS]
    return ", ".join(words) or "no"


class Notes:
    """Footnotes, each with its number once."""

    def __init__(self):
        self.numbers = {}

    def mark(self, text):
        return f"[^{self.numbers.setdefault(text, len(self.numbers) + 1)}]"

    def text(self):
        return "".join(f"[^{number}]: {text}\n" for text, number in self.numbers.items())


def row(architecture, notes):
    name = sys.modules[architecture.model_classes[0].__module__].__doc__.partition(" with per-layer sizes")[0]
    here = " ".join(prunable(architecture, notes))
    cells = [name, f"`{architecture.model_type}`", here, here]
    cells += [" ".join(cell) for cell in (stock(architecture, notes), gguf(architecture, notes), vllm(architecture))]
    return f"| {' | '.join(cells)} |\n"


def prunable(architecture, notes):
    support = architecture.support
    heads, letters = support["heads"], {}
    if heads.possible:
        letters["H"] = ""
    no_heads = "" if heads.possible else notes.mark(f"No heads: {heads.reason}")
    if support["channels"].possible:
        letters |= {"C": no_heads, "U": ""}
    elif heads.possible:
        letters["U"] = ""
    letters |= {"L": "", "S": ""}
    if support["experts"].possible:
        letters["E"] = no_heads
    if architecture.layout.normalizes_stream is not DecoderLayout.normalizes_stream:
        letters["L"] = notes.mark(NORMALIZED)
    if architecture.layout.first_layers is not DecoderLayout.first_layers:
        letters["L"] = notes.mark(FIRST_LAYERS)
    return [f"{letter}{mark}" for letter, mark in letters.items()]


def stock(architecture, notes):
    """What a stock checkpoint holds of the first tiny model of a family."""
    with torch.device("meta"):
        subject = Subject.of(tiny_model(architecture.model_type))
    halves = {kind: {site.key: half(site) for site in subject.sites if site.kind == kind} for kind in UnitKind}
    letters = {}
    if architecture.support["heads"].possible:
        letters["H"] = (STOCK_HEADS, halves[UnitKind.ATTENTION])
    if architecture.support["channels"].possible:
        letters["C"] = (STOCK_CHANNELS, halves[UnitKind.MLP])
    letters["L"] = ("", {site.key: [] for site in subject.sites if site.layer == subject.sites[-1].layer})
    if architecture.support["experts"].possible:
        letters["E"] = ("", halves[UnitKind.EXPERT])
    held = [letter for letter, (_, kept) in letters.items() if holds(subject, kept)]
    marks = [notes.mark(note) for letter, (note, _) in letters.items() if letter not in held]
    return [*held[:-1], held[-1] + "".join(marks)]


def tiny_model(model_type):
    for config_class, values in tiny_mixtures.CONFIGS.values():
        if config_class.model_type == model_type:
            return AutoModelForCausalLM.from_config(config_class(**values))
    for name, (config_class, _) in tiny.CONFIGS.items():
        if config_class.model_type == model_type:
            return AutoModelForCausalLM.from_config(tiny.make_config(name))
    configs = (make() for make in tiny_multimodal.CONFIGS.values())
    return AutoModelForImageTextToText.from_config(next(one for one in configs if one.model_type == model_type))


def half(site):
    """Half of the units of a site, equally many of every group."""
    size = site.num_units // site.num_groups
    return [unit for unit in range(site.num_units) if unit % size < max(1, size // 2)]


def holds(subject, kept):
    """Whether a stock checkpoint holds a model that keeps the units `kept` of some sites and all of the others."""
    everything = {site.key: list(range(site.num_units)) for site in subject.sites}
    if stays_stock(subject, everything | kept):
        return True
    try:
        config = pruned_config(subject, everything | kept, set())
        find_stock_form(config, subject.architecture.pruned_class(subject.model))
    except NoStockForm:
        return False
    return True


def gguf(architecture, notes):
    rules = RULES.get(architecture.model_type)
    if rules is None:
        return [f"no{notes.mark(REASONS[architecture.model_type])}"]
    reason = architecture.support["heads"].reason
    note = ""
    if rules.all_heads and not reason:
        note = notes.mark(BLOOM_HEADS if architecture.model_type == "bloom" else LLAMA_HEADS)
    layers = notes.mark(FIXED_PATTERN) if layers_without_rope in rules.checks else ""
    rest = ["U", "L", "S"] if rules.per_layer else [f"L{layers}"]
    if architecture.support["experts"].possible:
        everywhere = notes.mark(EXPERTS_EVERYWHERE) if architecture.layout.mlp is not None else ""
        return [*([] if rules.all_heads else ["H"]), f"{rest[0]}{note}", f"E{everywhere}"]
    letters = [f"C{note}"] if rules.all_heads else ["H", "C"]
    return [*letters, *rest]


def vllm(architecture):
    models = {case: tiny.CONFIGS[name][0].model_type for case, (name, _, _) in CASES.items()}
    if architecture.model_type not in models.values():
        return ["not run"]
    own = [case for case, model_type in models.items() if model_type == architecture.model_type]
    if all(case in REFUSED for case in own):
        return ["refused by vLLM"]
    removed = {fields["kinds"][0]: case for case in own if "kinds" in (fields := CASES[case][2])}
    kinds = {"layer": "L", "sublayer": "S"}
    return ["H", "C", "U", *(kinds[kind] for kind, case in removed.items() if case not in REFUSED)]


if __name__ == "__main__":
    pages.write(files())
