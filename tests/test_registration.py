"""Importing is cheap, pruned checkpoints are known whatever is imported first, and other families can join."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import transformers

from optimum_fwdprune import Architecture, FwdPruner, MLPLayout, register_architecture
from optimum_fwdprune.architectures import get_architecture, supported_architectures
from optimum_fwdprune.models.layout import LLAMA_LAYOUT
from optimum_fwdprune.models.pruned_llama import PrunedLlamaMixin


# What a user may import first; each must end with the Auto classes knowing pruned checkpoints.
ORDERS = {
    "plugin_then_auto_model": "import optimum_fwdprune; from transformers import AutoModelForCausalLM",
    "auto_model_then_plugin": "from transformers import AutoModelForCausalLM; import optimum_fwdprune",
    "plugin_then_config_only": "import optimum_fwdprune; from transformers import AutoConfig",
    "plugin_then_a_modelling_file": "import optimum_fwdprune; from transformers import LlamaForCausalLM",
    "plugin_then_auto_factory": "import optimum_fwdprune; import transformers.models.auto.auto_factory",
    "mixins_first": "import optimum_fwdprune.models.per_layer; from transformers import AutoModelForCausalLM",
    "a_family_first": "import optimum_fwdprune.models.pruned_llama; from transformers import AutoModelForCausalLM",
}
LOAD = """
from transformers import AutoConfig, AutoModelForCausalLM
assert type(AutoConfig.from_pretrained({path!r})).__module__.startswith("optimum_fwdprune.")
assert type(AutoModelForCausalLM.from_pretrained({path!r})).__name__ == "PrunedLlamaForCausalLM"
"""


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = "import sys, optimum_fwdprune; print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)

    assert result.stdout.strip() == "[]"


def test_no_family_is_imported_before_a_model_of_it_is_met(fresh_processes):
    result = fresh_processes.run("""
import sys
import optimum_fwdprune
from transformers import AutoConfig, AutoModelForCausalLM
from optimum_fwdprune.architectures import get_architecture, supported_architectures

def imported():
    files = {name.rpartition(".")[2] for name in sys.modules if ".models." in name}
    return {name for name in files if name.startswith(("modeling_", "pruned_"))} - {"modeling_auto"}

families = supported_architectures()
assert {"bloom", "llama", "mistral", "opt", "qwen2", "qwen3"} <= set(families), families
assert not imported(), imported()
assert "pruned_llama" in AutoConfig.for_model.__globals__["CONFIG_MAPPING"] and not imported()
assert type(AutoConfig.for_model("pruned_qwen2")).__name__ == "PrunedQwen2Config"
assert imported() == {"modeling_qwen2", "pruned_qwen2"}, imported()
assert get_architecture(AutoConfig.for_model("opt")).model_type == "opt"
assert imported() == {"modeling_qwen2", "pruned_qwen2", "modeling_opt", "pruned_opt"}, imported()
""")
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_family_that_transformers_lacks_is_left_out(fresh_processes, tmp_path):
    """`lacking` is no model type of transformers, and a class of `gpt2` that another version may have is not there."""
    (tmp_path / "pruned_lacking.py").write_text("from transformers.models.lacking import LackingModel")
    (tmp_path / "pruned_gpt2.py").write_text("from transformers.models.gpt2.modeling_gpt2 import GPT2ForEverything")
    result = fresh_processes.run(f"""
import optimum_fwdprune.models
optimum_fwdprune.models.__path__[:] = [{str(tmp_path)!r}, *optimum_fwdprune.models.__path__]
from transformers import AutoConfig
from optimum_fwdprune.architectures import get_architecture, registered_architectures, supported_architectures

assert "lacking" not in supported_architectures() and "llama" in supported_architectures()
names = [architecture.model_type for architecture in registered_architectures()]
assert "llama" in names and not {{"gpt2", "lacking"}} & set(names), names
for model_type, reason in (("pruned_lacking", "Unrecognized"), ("gpt2", "that their pruned.*GPT2ForEverything")):
    try:
        get_architecture(AutoConfig.for_model(model_type))
    except ValueError as error:
        import re
        assert re.search(reason, str(error)), error
    else:
        raise AssertionError(model_type)
""")
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_pickled_config_and_a_family_that_is_imported_by_name_are_known_to_the_auto_classes(fresh_processes):
    config = get_architecture(tiny.make_config("qwen3")).config_class.from_dict(tiny.make_config("qwen3").to_dict())
    result = fresh_processes.run(f"""
import pickle
import optimum_fwdprune
from transformers import AutoModelForCausalLM, AutoModel
model = AutoModelForCausalLM.from_config(pickle.loads({pickle.dumps(config)!r}))
assert type(model).__name__ == "PrunedQwen3ForCausalLM"
from optimum_fwdprune.models.pruned_mistral import PrunedMistralConfig
config = PrunedMistralConfig(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8,
                             num_hidden_layers=1, vocab_size=9)
assert type(AutoModel.from_config(config)).__name__ == "PrunedMistralModel"
""")
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    FwdPruner(tiny.make_model("llama_gqa_biases")).prune(method="magnitude").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("order", ORDERS)
def test_pruned_checkpoints_load_in_every_import_order(order, checkpoint, fresh_processes):
    result = fresh_processes.run(ORDERS[order] + LOAD.format(path=str(checkpoint)))

    assert result.returncode == 0, result.stderr[-3000:]


def test_an_unsupported_model_type_lists_the_supported_ones_and_how_to_register():
    config = transformers.BioGptConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=8, vocab_size=9)
    model = transformers.BioGptForCausalLM(config)
    with pytest.raises(ValueError) as error:
        FwdPruner(model)

    message = str(error.value)
    assert "'biogpt'" in message and "register_architecture" in message
    assert all(name in message for name in ("bloom", "llama", "mistral", "opt", "qwen2", "qwen3"))
    assert "persimmon" in supported_architectures()


def test_an_unsupported_model_type_fails_before_its_weights_are_read(tmp_path):
    transformers.BioGptConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'biogpt' is not supported"):
        FwdPruner.from_pretrained(tmp_path)


def test_an_architecture_without_the_mixin_is_refused():
    with pytest.raises(ValueError, match=r"BioGptModel lacks a layout.*PerLayerMixin"):
        register_architecture(Architecture((transformers.BioGptModel,)))
    assert "biogpt" not in supported_architectures()


def test_per_layer_sizes_of_another_tool_are_refused():
    model = tiny.make_model("llama_gqa_biases")
    model.config.per_layer_config = {1: {"intermediate_size": 32}}
    with pytest.raises(ValueError, match="per-layer sizes of another tool"):
        FwdPruner(model)


def test_a_task_class_without_a_pruned_counterpart_is_refused():
    class OtherHead(transformers.LlamaForCausalLM):
        pass

    with pytest.raises(ValueError, match=r"OtherHead has no pruned counterpart.*LlamaForCausalLM"):
        FwdPruner(OtherHead(tiny.make_config("llama_gqa_biases")))


def test_a_layout_that_names_the_wrong_module_fails_readably(monkeypatch, tokens):
    wrong = replace(LLAMA_LAYOUT, mlp=MLPLayout(("mlp.up_proj",), "mlp.down_proj"))
    monkeypatch.setattr(PrunedLlamaMixin, "layout", wrong)
    with pytest.raises(ValueError, match=r"mlp\.gate_proj is a linear of a LlamaDecoderLayer.*does not name it"):
        FwdPruner(tiny.make_model("llama_gqa_biases")).prune(tiny.request(reconstruction="none"), tokens)


def test_the_auto_map_names_every_task_class(tokens, tmp_path):
    FwdPruner(tiny.make_model("qwen2")).prune(None, tokens).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]

    assert auto_map["AutoConfig"] == "pruned_qwen2.PrunedQwen2Config"
    assert len(auto_map) == 6
