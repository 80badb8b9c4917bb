"""The two commands of docs/how_to/laptop.md on the real Qwen2.5-Coder-0.5B-Instruct, where `QWEN` is its folder."""

import os
import re
import sys
from pathlib import Path

import pytest
from llama_cpp import llama_cpp
from optimum.commands.optimum_cli import main as optimum_cli


QWEN = os.environ.get("QWEN", "")


@pytest.mark.skipif(not QWEN, reason="QWEN is not set to a folder with Qwen2.5-Coder-0.5B-Instruct")
def test_the_pruned_model_writes_code_in_llama_cpp(tmp_path, monkeypatch, capfd):
    coder, file = str(tmp_path / "coder"), str(tmp_path / "coder-q4_0.gguf")
    request = ["--preset", "fast", "--sparsity", "0.2", "--for_gguf", "q4_0", "--calibration", "builtin"]
    for words in (
        ["prune", "-m", QWEN, coder, *request, "--n_samples", "16", "--seq_len", "256"],
        ["export", coder, file, "--outtype", "q4_0"],
    ):
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "fwdprune", *words])
        optimum_cli()

    assert "it removes 19.9% of the prunable parameters, compared with 20.0% without it." in capfd.readouterr().err
    assert Path(file).stat().st_size < 400e6
    with llama_cpp(file) as ask:
        code = ask("def fibonacci(n):", 48)["content"]
    assert re.search(r"range\(2, ?n|fibonacci\(n ?- ?1\)", code), code
