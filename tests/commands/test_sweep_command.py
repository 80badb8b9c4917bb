"""`optimum-cli fwdprune sweep`: the files that it writes, its table, and its errors."""

import json


def test_a_sweep_is_written_shown_and_continued(cli, checkpoints, tmp_path):
    text = tmp_path / "fox.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    small = ("--calibration", text, "--n_samples", "4", "--seq_len", "32")
    sizes = ("sweep", "-m", checkpoints / "dense", tmp_path / "s", "--text", text, *small, "--no-speed")
    code, out, err = cli(*sizes, "--sparsity", "0.2", "0.4", "--method", "wanda_sp", "magnitude", "--keep", "0.4")

    assert code == 0, err
    assert "perplexity" in out and "wanda_sp-0.2" in out and "sweep.json" in out
    document = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert [row["request"]["method"] for row in document["rows"]] == ["wanda_sp"] * 2 + ["magnitude"] * 2
    assert (tmp_path / "s" / "magnitude-sparsity-0.4" / "config.json").is_file()
    code, out, err = cli(*sizes, "--sparsity", "0.2", "--method", "wanda_sp")
    assert code == 0 and "is measured" not in err, err
    assert json.loads((tmp_path / "s" / "sweep.json").read_text()) == document

    for words, message in {
        ("--sparsity", "0.2", "--target_bytes", "100000"): "sparsity and --target_bytes are two budgets",
        (): "A sweep needs sizes, such as --sparsity 0.1 0.2 0.3",
        ("--sparsity", "0.2", "--keep", "0.3"): "--keep 0.3 is none of the sizes",
        ("--sparsity", "0.2", "--draws", "3"): "--draws is an option of method mini_llm",
    }.items():
        code, _, err = cli("sweep", "-m", checkpoints / "dense", tmp_path / "t", *words)
        assert code == 1 and message in err, err
        assert not (tmp_path / "t").exists()
