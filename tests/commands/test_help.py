"""Help that a person can read, and what was likely meant where a word is misspelt."""

import argparse
import dataclasses
import shlex
import subprocess
import sys

import pytest
import tiny
from optimum.commands.optimum_cli import RootOptimumCLICommand, register_optimum_cli_subcommand

from optimum_fwdprune import PruningConfig
from optimum_fwdprune.commands.fwdprune import GROUPS, FwdPruneCommand
from optimum_fwdprune.request.registry import get_method, registered_methods
from optimum_fwdprune.words import did_you_mean


COMMANDS = {info.name: info.subcommand_class for info in FwdPruneCommand.SUBCOMMANDS}


@pytest.fixture
def root(monkeypatch):
    """The parser that `optimum-cli` makes, on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    root = RootOptimumCLICommand("Optimum CLI tool", usage="optimum-cli")
    register_optimum_cli_subcommand(FwdPruneCommand, parent_command=root)
    return root.parser


@pytest.fixture
def run(root, capsys):
    """Parse a command line; returns `(exit code, stdout, stderr)`."""

    def run(*words):
        with pytest.raises(SystemExit) as stopped:
            root.parse_args(["fwdprune", *words])
        return (stopped.value.code, *capsys.readouterr())

    return run


def parser_of(root, name):
    """The parser of a command."""

    def below(parser, word):
        (subparsers,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
        return subparsers.choices[word]

    return below(below(root, "fwdprune"), name)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_its_usage_in_a_line_and_examples_that_parse(root, run, name):
    code, out, _ = run(name, "--help")
    usage, _, rest = out.partition("\n")
    examples = [line.strip() for line in out.partition("\nexamples:\n")[2].strip().splitlines()]

    assert code == 0
    assert usage == f"usage: optimum-cli fwdprune {name} {COMMANDS[name].USAGE} [options]"
    assert rest.startswith("\n") and len(examples) >= 2
    for example in examples:
        assert example.startswith(f"optimum-cli fwdprune {name} ")
        assert root.parse_args(shlex.split(example)[1:]).func


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_commands_stand_under_what_they_are_for_in_a_line_each(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = run("--help")

    assert code == 0 and all(len(line) < columns for line in out.splitlines())
    assert out.count("\ncommands:") == 0
    for heading, commands in GROUPS.items():
        listed = out.partition(f"\n{heading}:\n")[2].partition("\n\n")[0].splitlines()
        assert [line.split(maxsplit=1) for line in listed] == [[each.name, each.help] for each in commands]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_with_its_default(root, name):
    for action in parser_of(root, name)._actions:
        assert action.help, action.dest
        is_given = action.default not in (None, False, [], argparse.SUPPRESS)
        assert not is_given or f"default: {_shown(action.default)}" in action.help.lower(), action.dest


def _shown(default):
    return " ".join(map(str, default)) if isinstance(default, list) else str(default).lower()


def test_defaults_of_requests_are_those_of_the_configs(run):
    _, out, _ = run("prune", "--help")
    text = " ".join(out.partition("\nexamples:")[0].split())

    for name in registered_methods():
        for field in dataclasses.fields(get_method(name).config_class):
            if field.default not in (None, dataclasses.MISSING) and field.name not in ("method", "scope"):
                # Presets name options, too, before these are listed.
                shown = text.rpartition(f" --{field.name} ")[2] or text.rpartition(f" --{field.name}, ")[2]
                assert f"(default: {field.default})" in shown.partition(" --")[0] or field.default is False, field.name


def test_options_of_a_request_stand_under_headings(root):
    """Every field of the base config under one of its own, a method's under the method's."""
    groups = {
        action.dest: group.title
        for group in parser_of(root, "prune")._action_groups
        for action in group._group_actions
    }
    base = {field.name: field.metadata["group"] for field in dataclasses.fields(PruningConfig)}

    assert {name: groups[name] for name in base} == base
    assert {"budget", "what is pruned", "calibration", "reconstruction"} <= set(base.values())
    assert groups["draws"] == "method mini_llm" and groups["steps"] == "method policy_gradient"
    assert "options" not in {groups[name] for name in base}


def test_options_of_recovery_stand_under_headings(root):
    titles = {group.title for group in parser_of(root, "recover")._action_groups if group._group_actions}

    assert {"recovery", "adapters", "distillation, with --mode distill", "data", "training"} <= titles


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["prune", "--sparcity", "0.3"], "there is no option --sparcity. Did you mean --sparsity?"),
        (["prune", "--sparcity=0.3"], "there is no option --sparcity. Did you mean --sparsity?"),
        (["prune", "--modell", "x", "out"], "Did you mean --model?"),
        (["prune", "-m", "x", "out", "--skip-layers", "0"], "Did you mean --skip_layers?"),
        (
            ["prune", "-m", "x", "out", "--method", "wandasp"],
            "'wandasp' is not one of block_influence, expert_frequency, flap, magnitude,",
        ),
        (["prune", "-m", "x", "out", "--method", "wandasp"], "Did you mean wanda_sp?"),
        (["prune", "-m", "x", "out", "--preset", "balance"], "Did you mean balanced?"),
        (["prune", "-m", "x", "out", "--reconstruction", "least-squares"], "Did you mean least_squares?"),
        (["prune", "-m", "x", "out", "--kinds", "attention", "mpl"], "Did you mean mlp?"),
        (["export", "x", "out", "--format", "ggfu"], "Did you mean gguf?"),
        (["recover", "x", "out", "--mode", "distil"], "Did you mean distill?"),
        (["prnue"], "Did you mean prune?"),
        (["reprot", "x"], "Did you mean report?"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_was_likely_meant_is_named(run, words, meant):
    code, _, err = run(*words)

    assert code == 2 and "usage" in err
    assert meant in err


def test_nothing_is_suggested_for_what_is_like_nothing(run):
    code, _, err = run("prune", "-m", "x", "out", "--astrology", "1")

    assert code == 2 and "there is no option --astrology." in err and "Did you mean" not in err


def test_beginnings_of_options_and_negative_numbers_are_read(root):
    found = root.parse_args(["fwdprune", "prune", "-m", "x", "out", "--spars", "0.3", "--skip_layers", "0", "-1"])

    assert (found.sparsity, found.skip_layers) == (0.3, [0, -1])


@pytest.mark.parametrize(
    ("ask", "error", "meant"),
    [
        (lambda: tiny.request(method="wandasp"), ValueError, "got 'wandasp'. Did you mean wanda_sp?"),
        (lambda: tiny.request("FLAP"), ValueError, "got 'FLAP'. Did you mean flap?"),
        (lambda: PruningConfig.from_preset("ballanced"), ValueError, "Did you mean balanced?"),
        (lambda: tiny.request(scope="globall"), ValueError, "Did you mean global?"),
        (lambda: tiny.request(kinds=["mpl"]), ValueError, "Did you mean mlp?"),
        (lambda: tiny.request(sparcity=0.3), TypeError, "has no option 'sparcity'. Did you mean sparsity?"),
        (lambda: tiny.request(method="flap", astrology=1), TypeError, "FlapConfig has no option 'astrology'.$"),
    ],
)
def test_python_names_what_was_likely_meant(ask, error, meant):
    with pytest.raises(error, match=meant.replace("?", r"\?")):
        ask()


def test_words_are_near_whatever_their_case_and_dashes():
    assert did_you_mean("--Skip-Layers", ["--skip_layers", "--seed"]) == " Did you mean --skip_layers?"
    assert did_you_mean("x", ["--skip_layers"]) == ""
    options = ["seed", "layout", "calibration", "n_samples", "target_speedup"]
    far = ["amount", "ratio", "epochs", "model"]
    near = {"samples": "n_samples", "speedup": "target_speedup", "num_samples": "n_samples"}
    assert [did_you_mean(word, options) for word in far] == [""] * len(far)
    assert {word: did_you_mean(word, options) for word in near} == {w: f" Did you mean {n}?" for w, n in near.items()}


@pytest.mark.parametrize("words", [["--help"], ["fwdprune", "--help"], ["fwdprune", "prune", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(words):
    script = (
        "import sys\n"
        "from optimum.commands.optimum_cli import main\n"
        f"sys.argv = ['optimum-cli', *{words}]\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'matplotlib', 'jinja2', 'safetensors'}\n"
        "print('heavy:', *sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert "usage: " in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["heavy:"]
