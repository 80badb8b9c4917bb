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
