"""Wrong input of every command: one line that names the value and the way out, in the words of the command line."""

import os
import subprocess
import sys
from argparse import ArgumentParser, BooleanOptionalAction

import pytest

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.commands.inspect import InspectCommand
from optimum_fwdprune.commands.wording import in_options
from optimum_fwdprune.runs.loggers import get_logger
from optimum_fwdprune.runs.progress import announce


@pytest.fixture
def folder(checkpoints, tmp_path, monkeypatch):
    """The current folder, with checkpoints, a text, a file that is none, and an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("dense", "pruned"):
        (tmp_path / name).symlink_to(checkpoints / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("")
    (tmp_path / "short.txt").write_text("the quick brown fox")
    (tmp_path / "text.txt").write_text("the quick brown fox " * 3000)
    (tmp_path / "rows.jsonl").write_text('{"a": "the fox", "b": "the dog"}')
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "the fox"}]}')
    return tmp_path


# In every command, `{}` is replaced by the name of a model, a checkpoint or a file that the command reads.
READING = [
    ("inspect", "{}"),
    ("report", "{}"),
    ("prune", "-m", "{}", "out"),
    ("prune", "-m", "dense", "out", "--plan", "{}"),
    ("prune", "-m", "dense", "out", "--calibration", "{}"),
    ("export", "{}", "out"),
    ("recover", "{}", "out", "--dataset", "text.txt"),
    ("recover", "pruned", "out", "--dataset", "{}"),
    ("evaluate", "{}", "--text", "text.txt"),
    ("evaluate", "dense", "--text", "{}"),
    ("benchmark", "{}"),
    ("compare", "dense", "{}"),
    ("report", "pruned", "--compare", "{}"),
]


@pytest.mark.parametrize("value", ["nope", "some/nope", "empty", "note.txt"])
@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_what_cannot_be_read_is_named(words, value, cli, folder):
    code, _, error = cli(*(word.format(value) for word in words))

    last = error.strip().splitlines()[-1]
    assert code in (1, 2) and last.startswith("error: ") and value in last, error
    assert "Traceback" not in error and "Errno" not in error and not (folder / "out").exists()


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_what_is_empty_is_named(words, cli, folder):
    code, _, error = cli(*(word.format("") for word in words))

    assert code == 1 and error.strip().splitlines()[-1].startswith("error: "), error
    assert " is empty; give it a value." in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("prune", "-m", "dense", "pruned"), "pass --overwrite to replace it"),
        (("prune", "-m", "dense", "out", "--sparsity", "1.5"), "--sparsity must be in [0, 1); got 1.5"),
        (
            ("prune", "-m", "dense", "out", "--sparsity", "30"),
            "got 30.0. It is the fraction of the prunable parameters to remove. Did you mean 0.3?",
        ),
        (
            ("prune", "-m", "dense", "out", "--sparsity", "0.3", "--target_memory", "1MB"),
            "sparsity and --target_memory are two budgets",
        ),
        (("prune", "-m", "dense", "out", "--context_tokens", "32X"), "--context_tokens must be an int, such as 500K"),
        (("prune", "-m", "densee", "out"), ", or name a folder that holds the model. Did you mean dense?"),
        (
            ("prune", "-m", ".", "out"),
            ". has no config.json, so that it holds no model. Did you mean dense or pruned?",
        ),
        (("export", "pruned", "out", "--outtype", "q8_0"), "--outtype is for GGUF files, and out will be a folder."),
        (("export", "pruned", "out", "--pre_tokenizer", "gpt-2"), "--pre_tokenizer is for GGUF files, and out will"),
        (("prune", "-m", "dense", "out", "--calibration", "short.txt"), "Lower --n_samples or --seq_len"),
        (("prune", "-m", "dense", "out", "--calibration", "note.txt"), "note.txt is empty"),
        (("prune", "-m", "dense", "out", "--refit_sources", "--reconstruction", "none"), "set --no-refit_sources, or"),
        (("prune", "-m", "dense", "out", "--recovery", "mode=full"), "name its data too, such as --recover wikitext2"),
        (
            ("prune", "-m", "dense", "out", "--recover", "x.txt", "--recovery", "mod=full"),
            "Did you mean mode?",
        ),
        (("prune", "-m", "dense", "out", "--recover", "x.txt", "--recovery", "full"), "takes NAME=VALUE; got 'full'"),
        (
            ("prune", "-m", "dense", "out", "--recover", "x.txt", "--recovery", "output_dir=out/a"),
            "must be empty until",
        ),
        (("prune", "-m", "dense", "out", "--recover", "x.txt", "--plan", "pruned"), "Leave --recover out"),
        (("prune", "-m", "dense", "out", "--layout", "stock", "--scope", "global"), "--layout stock cuts every layer"),
        (
            ("prune", "-m", "dense", "out", "--low-memory", "--rounds", "2"),
            "--rounds 2 runs whole models, and --low",
        ),
        (("prune", "-m", "dense", "out", "--tokenizer", "nope"), "error: Cannot load the tokenizer nope: "),
        (("prune", "-m", "dense", "out", "--plan", "pruned", "--kinds", "mlp"), "so --kinds mlp would have no effect"),
        (
            ("prune", "-m", "dense", "out", "--plan", "pruned/config.json"),
            "not a pruning plan: it must be a JSON object with",
        ),
        (("prune", "-m", "dense", "out", "--dtype", "nope"), "--dtype nope is no dtype; use auto, float32"),
        (("evaluate", "dense", "--text", "text.txt", "--max_length", "9999"), "--max_length 9999 is more than the"),
        (
            ("evaluate", "dense", "--text", "rows.jsonl"),
            "has the columns a, b. Set --text_column to the one that holds",
        ),
        (("compare", "dense", "pruned", "--text", "chat.jsonl"), "Set --text_column to use another column."),
        (("prune", "-m", "dense", "out", "--calibration", "rows.jsonl"), "Set --dataset_column to the one that holds"),
        (
            ("recover", "pruned", "out", "--dataset", "self"),
            "self is text that the teacher writes, and --mode lora has no teacher",
        ),
        (("report", "pruned", "--output", "text.txt"), "pass --overwrite to replace it"),
    ],
)
def test_errors_speak_of_options(words, message, cli, folder):
    code, _, error = cli(*words)

    assert code == 1 and message in error, error


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("sparsity=0.3. Reduce the budget.", "--sparsity 0.3. Reduce the budget."),
        ("under kinds=['attention', 'mlp'], x", "under --kinds attention mlp, x"),
        ("Prune with scope='layer' (--scope layer).", "Prune with --scope layer."),
        ("set overwrite=True", "set --overwrite"),
        ("set refit=False or refit=True", "set --no-refit or --refit"),
        ("with skip_layers=None", "with no --skip_layers"),
        ("name it as dataset_column.", "name it as --text_column."),
        ("plan=... (--plan) and other=... name it", "--plan and other=... name it"),
        ("/home/me/seq_len/x=3.txt has seq_len", "/home/me/seq_len/x=3.txt has --seq_len"),
        ("the scope of it is a plan, other_name=3", "the scope of it is a plan, other_name=3"),
        ("`seq_len` and --seq_len and 'seq_len'", "`seq_len` and --seq_len and 'seq_len'"),
    ],
)
def test_arguments_become_the_options_that_there_are(message, expected):
    parser = ArgumentParser()
    for name in ("sparsity", "kinds", "scope", "skip_layers", "seq_len", "plan", "text_column"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--refit", action=BooleanOptionalAction)

    assert in_options(message, parser) == expected


def test_a_reader_that_has_seen_enough_is_no_error(folder):
    script = "import sys; sys.argv = ['optimum-cli', 'fwdprune', 'inspect', 'pruned']\n"
    script += "from optimum.commands.optimum_cli import main; main()"
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([sys.executable, "-c", script], stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)

    assert done.returncode == 141 and done.stderr == ""


def test_an_interrupt_is_one_line(cli, folder, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(InspectCommand, "execute", interrupted)
    assert cli("inspect", "pruned") == (130, "", "Interrupted.\n")
    monkeypatch.setattr(FwdPruner, "prune", interrupted)
    code, _, error = cli("prune", "-m", "dense", "out", "--resume", "state")
    assert code == 130 and error.endswith(
        "Interrupted. Run the same command again to resume from the state in state.\n"
    )
    assert not (folder / "out").exists()


def test_the_folder_of_the_training_is_named(cli, folder):
    code, out, error = cli(
        *("recover", "pruned", "out", "--dataset", "text.txt", "--max_steps", 1, "--max_length", 16),
        *("--set", "use_cpu=true", "save_strategy=no", "disable_tqdm=true"),
    )

    assert code == 0, error
    assert ("out-training" in out) == (folder / "out-training").exists() and "Saved to out." in out


def test_warnings_and_announcements_speak_of_options_while_a_command_runs(cli, folder, capsys):
    code, _, error = cli("prune", "-m", "dense", "out", "--calibration", "text.txt", "--seq_len", "2048")
    assert code == 0 and "Name more text, or set --n_samples." in error, error
    short = ("--calibration", "text.txt", "--seq_len", "32", "--n_samples", "4")
    code, _, error = cli("prune", "-m", "dense", "other", *short, "--for_gguf", "q8_0")
    assert code == 0 and "--for_gguf q8_0: " in error and "for_gguf=" not in error, error

    announce("set n_samples")
    get_logger("optimum_fwdprune.anywhere").warning("set n_samples")
    assert capsys.readouterr().err == "set n_samples\n[optimum_fwdprune] set n_samples\n"
