"""`optimum-cli fwdprune export`, and `prune --layout stock` before it."""

import json

import pytest
import tiny
import tiny_multimodal
import torch
import transformers

from optimum_fwdprune import FwdPruner


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A dense checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("export")
    tiny.make_model("llama_mqa").save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    return folder


BOTH = ["--kinds", "attention", "mlp"]
SMALL = ["--calibration", "builtin", "--n_samples", "4", "--seq_len", "32"]


def test_a_stock_layout_is_pruned_and_exported(cli, folder, tokens, tmp_path):
    code, _, err = cli("prune", "-m", folder / "dense", tmp_path / "pruned", "--layout", "stock", *BOTH, *SMALL)
    assert code == 0, err
    code, out, err = cli("export", tmp_path / "pruned", tmp_path / "stock", "--format", "stock")

    assert code == 0, err
    assert f"Written to {tmp_path / 'stock'}" in out
    pruned, stock = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / each) for each in ("pruned", "stock")
    )
    # Five heads of 8 do not divide 48.
    assert type(stock) is transformers.MistralForCausalLM
    assert torch.equal(pruned(tokens).logits, stock(tokens).logits)
    assert (tmp_path / "stock" / "tokenizer.json").exists()
    code, _, err = cli("export", tmp_path / "pruned", tmp_path / "stock")
    assert code == 1 and "is not empty" in err


def test_a_model_without_whole_layers_is_a_stock_checkpoint_that_every_command_knows_as_pruned(
    cli, folder, tokens, tmp_path
):
    depth = ["--kinds", "layer", "--method", "removal_loss", "--sparsity", "0.34"]
    code, out, err = cli("prune", "-m", folder / "dense", tmp_path / "pruned", *depth, *SMALL)
    assert code == 0, err
    for command in (["report", tmp_path / "pruned"], ["inspect", tmp_path / "pruned"]):
        code, out, err = cli(*command)
        assert code == 0 and "1 of 3 layers is removed" in out, (out, err)
    code, _, err = cli("export", tmp_path / "pruned", tmp_path / "stock", "--format", "stock")
    assert code == 0, err

    pruned, stock = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / each) for each in ("pruned", "stock")
    )
    assert type(pruned) is type(stock) is transformers.LlamaForCausalLM
    assert pruned.config.num_hidden_layers == stock.config.num_hidden_layers == 2
    assert torch.equal(pruned(tokens).logits, stock(tokens).logits)
    # The export has no record, so that it is a dense model to every command.
    assert FwdPruner.from_pretrained(tmp_path / "pruned").plan is not None
    assert FwdPruner.from_pretrained(tmp_path / "stock").plan is None
    code, _, err = cli("export", tmp_path / "stock", tmp_path / "again", "--format", "stock")
    assert code == 1 and "was not pruned by this package" in err


@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_the_processor_of_a_multimodal_model_is_exported_with_it(cli, own_tokenizer, tmp_path):
    processor = tiny_multimodal.make_processor("gemma3")
    pruner = FwdPruner(tiny_multimodal.make_model("gemma3"), processor)
    pruner.prune(None, tiny_multimodal.text_tokens(), layout="stock", reconstruction="none")
    pruner.save_pretrained(tmp_path / "pruned")
    processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = ["--tokenizer", tmp_path / "tokenizer"] if own_tokenizer else []
    code, _, err = cli("export", tmp_path / "pruned", tmp_path / "stock", *options)

    assert code == 0, err
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "stock").get_vocab() == processor.tokenizer.get_vocab()
    )
    file = tmp_path / "stock" / "processor_config.json"
    # Whoever replaces the tokenizer has a processor of another one.
    assert file.exists() != own_tokenizer
    assert own_tokenizer or json.loads(file.read_text())["processor_class"] == "Gemma3Processor"


def test_uneven_layers_are_refused_in_one_line(cli, folder, tmp_path):
    code, _, err = cli("prune", "-m", folder / "dense", tmp_path / "pruned", "--scope", "global", *SMALL)
    assert code == 0, err
    code, _, err = cli("export", tmp_path / "pruned", tmp_path / "stock")
    lines = [line for line in err.splitlines() if line.startswith("error")]

    assert code == 1 and len(lines) == 1 and "--layout stock" in lines[0] and "Traceback" not in err
    assert not (tmp_path / "stock").exists()
