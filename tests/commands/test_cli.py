"""`optimum-cli fwdprune ...`, as a user runs it."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers

from optimum_fwdprune import Calibration, FwdPruner, PruningConfig, PruningPlan
from optimum_fwdprune.request.registry import get_method, registered_methods
from optimum_fwdprune.scoring.methods import PolicyGradientConfig
from optimum_fwdprune.scoring.scores import Scores


SMALL = ["--calibration", "builtin", "--n_samples", "4", "--seq_len", "32"]


@pytest.fixture
def source(tmp_path, tokenizer):
    """A dense checkpoint with a tokenizer, in bfloat16."""
    tiny.make_model("llama_gqa_biases", dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return str(tmp_path / "dense")


def test_the_installed_command_prunes_and_inspects(source, tmp_path):
    """The one test through the console script; the others run in this process."""
    command = shutil.which("optimum-cli", path=str(Path(sys.executable).parent))
    assert command, "optimum-cli is not beside the interpreter that runs the tests"
    output = tmp_path / "out"

    def run(*arguments):
        return subprocess.run([command, "fwdprune", *arguments], capture_output=True, text=True)

    pruned = run("prune", "-m", source, str(output), "--sparsity", "0.3", "--scope", "global", *SMALL)
    inspected = run("inspect", str(output))

    assert pruned.returncode == 0, pruned.stderr
    assert "Parameters" in pruned.stdout and re.search(r"Prunable.*-(29|30)\.\d%", pruned.stdout)
    assert inspected.returncode == 0 and "MLP channels" in inspected.stdout
    assert inspected.stdout.count("/ 64") == 3
    assert "llama pruned by wanda_sp, from dense" in inspected.stdout
    model = transformers.AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert type(model).__name__ == "PrunedLlamaForCausalLM" and model.dtype == torch.bfloat16


def test_every_field_of_every_method_is_an_option_with_help(cli):
    code, out, _ = cli("prune", "--help")

    assert code == 0
    for name in registered_methods():
        for field in dataclasses.fields(get_method(name).config_class):
            assert f"--{field.name}" in out, field.name


def test_options_reach_the_request(cli, source, tmp_path):
    code, _, err = cli(
        *("prune", "-m", source, tmp_path / "out", "--method", "flap", "--sparsity", "0.4", "--scope", "global"),
        *("--budget", "joint", "--kinds", "mlp", "--multiple_of", "4", "--skip_layers", "0", "-1", "--seed", "3"),
        *("--reconstruction", "least_squares", "--attention_unit", "kv_group", *SMALL, "--mlp_sparsity", "0.1"),
    )
    config = PruningConfig.from_pretrained(tmp_path / "out")

    assert code == 0, err
    assert config == tiny.request(
        method="flap",
        sparsity=0.4,
        scope="global",
        budget="joint",
        kinds=["mlp"],
        multiple_of=4,
        skip_layers=[0, -1],
        seed=3,
        reconstruction="least_squares",
        attention_unit="kv_group",
        mlp_sparsity=0.1,
        calibration="builtin",
        n_samples=4,
        seq_len=32,
    )


def test_an_option_without_values_spares_no_layer(cli, source, tmp_path):
    code, _, err = cli("prune", "-m", source, tmp_path / "out", "--skip_layers", "--method", "random", *SMALL)

    assert code == 0, err
    assert PruningConfig.from_pretrained(tmp_path / "out").skip_layers == []


def test_options_of_a_method_reach_its_request(cli, source, tmp_path):
    code, _, err = cli(
        *("prune", "-m", source, tmp_path / "out", "--method", "mini_llm", "--draws", "6", "--epsilon", "0.02"),
        *("--noise", "gaussian", "--perturb", "units", "--windows_per_draw", "2", "--stop_after", "4", *SMALL),
    )
    config = PruningConfig.from_pretrained(tmp_path / "out")
    plan = PruningPlan.load(tmp_path / "out")

    assert code == 0, err
    assert (config.draws, config.epsilon, config.noise) == (6, 0.02, "gaussian")
    assert (config.perturb, config.windows_per_draw, config.stop_after) == ("units", 2, 4)
    assert plan.metadata["scoring"]["draws"] == 6


def test_the_papers_preset_and_the_default_run(cli, source, tmp_path):
    few = ["--steps", "3", "--windows_per_step", "2", *SMALL]
    paper = cli(
        "prune", "-m", source, tmp_path / "paper", "--preset", "policy-gradient-paper", "--sparsity", 0.4, *few
    )
    default = cli("prune", "-m", source, tmp_path / "default", "--method", "policy_gradient", *few)
    found = {name: PruningConfig.from_pretrained(tmp_path / name) for name in ("paper", "default")}

    assert (paper[0], default[0]) == (0, 0), (paper, default)
    assert found["paper"] == PolicyGradientConfig.paper(
        sparsity=0.4, steps=3, windows_per_step=2, calibration="builtin", n_samples=4, seq_len=32
    )
    assert (found["default"].estimator, found["default"].steps) == ("leave_one_out", 3)


def test_presets_by_cost_run_with_other_methods(cli, source, tmp_path):
    for name, method, order, sources in (
        ("fast", "magnitude", "independent", False),
        ("best", "flap", None, True),
    ):
        code, _, error = cli(
            "prune", "-m", source, tmp_path / name, "--preset", name, "--method", method, *SMALL, "--sparsity", 0.3
        )
        found = PruningConfig.from_pretrained(tmp_path / name)
        assert code == 0, error
        assert (found.method, found.reconstruction_order, found.refit_sources) == (method, order, sources)


def test_a_preset_of_another_method_is_an_error(cli, source, tmp_path):
    code, _, error = cli(
        "prune", "-m", source, tmp_path / "out", "--preset", "policy-gradient-paper", "--method", "flap"
    )

    assert code == 1 and "--preset policy-gradient-paper is for method policy_gradient; leave out --method" in error


def test_the_history_of_learning_is_shown_and_drawn(cli, source, tmp_path):
    output, picture = tmp_path / "out", tmp_path / "history.png"
    cli("prune", "-m", source, output, "--method", "policy_gradient", "--steps", 12, "--skip_layers", 1, *SMALL)
    code, shown, _ = cli("inspect", output, "--history", "--plot", picture)
    history = Scores.load(output).history

    assert code == 0
    assert "1 to 2" in shown and "11 to 12" in shown
    assert f"{float(history['loss'][:2].mean()):.3f}" in shown
    assert picture.read_bytes().startswith(b"\x89PNG") and list(tmp_path.glob(".*")) == []
    code, _, error = cli("inspect", output, "--plot", tmp_path / "history.astrology")
    assert code == 1 and "must end in one of" in error and "svg" in error


def test_scores_are_read_in_a_process_that_does_nothing_else(cli, source, tmp_path):
    cli("prune", "-m", source, tmp_path / "out", "--method", "policy_gradient", "--steps", 2, *SMALL)
    script = f"from optimum_fwdprune import Scores; print(Scores.load({str(tmp_path / 'out')!r}).config.method)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert run.stdout.strip() == "policy_gradient", run.stderr


def test_a_replayed_plan_has_no_history(cli, source, tmp_path):
    cli("prune", "-m", source, tmp_path / "out", *SMALL)
    cli("prune", "-m", source, tmp_path / "again", "--plan", tmp_path / "out")
    code, _, error = cli("inspect", tmp_path / "again", "--history")

    assert code == 1 and "again has no fwdprune/scores.safetensors" in error


def test_a_method_that_does_not_learn_has_no_history(cli, source, tmp_path):
    cli("prune", "-m", source, tmp_path / "out", *SMALL)
    code, _, error = cli("inspect", tmp_path / "out", "--history")

    assert code == 1 and "There is no history of learning" in error


def test_without_options_the_command_does_what_prune_without_arguments_does(cli, source, tmp_path, monkeypatch):
    # What the defaults would sample is cut short, for both alike.
    tokens = Calibration(torch.arange(96).view(4, 24))
    monkeypatch.setattr("optimum_fwdprune.planning.calibration_text.load_calibration", lambda *_: tokens)
    assert cli("prune", "-m", source, tmp_path / "out")[0] == 0
    pruner = FwdPruner.from_pretrained(source)
    pruner.prune()

    assert PruningPlan.load(tmp_path / "out").kept == pruner.plan.kept
    assert PruningConfig.from_pretrained(tmp_path / "out") == pruner.config


def test_a_dry_run_shows_the_outcome_and_writes_nothing(cli, source, tmp_path):
    code, out, err = cli("prune", "-m", source, tmp_path / "out", "--dry-run", "--sparsity", "0.3", *SMALL)

    assert code == 0, err
    assert "The pruned model will have" in out and "The run takes at least" in out and "MLP channels" in out
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    code, _, err = cli("prune", "-m", source, source, "--dry-run", *SMALL)
    assert code == 1 and "is not empty. Name another folder, or pass --overwrite" in err


def test_a_plan_is_replayed(cli, source, tmp_path):
    cli("prune", "-m", source, tmp_path / "one", "--method", "random", "--reconstruction", "none")
    code, _, err = cli("prune", "-m", source, tmp_path / "two", "--plan", tmp_path / "one")

    assert code == 0, err
    assert PruningPlan.load(tmp_path / "two").kept == PruningPlan.load(tmp_path / "one").kept
    assert (tmp_path / "two/model.safetensors").read_bytes() == (tmp_path / "one/model.safetensors").read_bytes()


def test_dtype_is_the_sources_unless_given(cli, source, tmp_path):
    assert cli("prune", "-m", source, tmp_path / "out", "--method", "random", "--dtype", "float32")[0] == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1.5"], "error: --sparsity must be in [0, 1); got 1.5."),
        (["--sparsity", "0.98", *SMALL], "the largest possible sparsity is 0."),
        (["--calibration", "nowhere.txt"], "error: There is no file nowhere.txt."),
        (["--calibration", "builtin", "--n_samples", "9999999"], "error: builtin is too short"),
        (["--plan", "nowhere.json"], "nowhere.json"),
        (["--draws", "3"], "error: --draws is an option of method mini_llm; the method asked for is wanda_sp."),
        (["--method", "mini_llm", "--draws", "0"], "error: --draws must be at least 1; got 0."),
        (["--method", "mini_llm", "--epsilon", "1e-9", *SMALL], "error: --epsilon 1e-09 is lost in rounding"),
        (["--dtype", "float77"], "float77"),
        (["--attn_implementation", "telepathy"], "telepathy"),
        (["--gguf_file", "nowhere.gguf"], "nowhere.gguf"),
    ],
)
def test_a_users_error_is_one_readable_line(cli, source, tmp_path, arguments, message):
    code, _, err = cli("prune", "-m", source, tmp_path / "out", *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error")]

    assert code == 1 and len(lines) == 1
    assert message in lines[0] and "--debug" in lines[0]
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_debug_shows_the_traceback(cli, source, tmp_path):
    with pytest.raises(ValueError, match="sparsity must be in"):
        cli("prune", "-m", source, tmp_path / "out", "--sparsity", "1.5", "--debug")


@pytest.mark.parametrize("arguments", [["--method", "psychic"], ["--scope", "planet"], ["--nonsense", "1"]])
def test_an_unknown_value_or_option_shows_the_usage(cli, source, tmp_path, arguments):
    code, _, err = cli("prune", "-m", source, tmp_path / "out", *arguments)

    assert code == 2 and "usage" in err


def test_a_missing_or_unsupported_model_is_named(cli, tmp_path):
    transformers.BioGptConfig().save_pretrained(tmp_path / "biogpt")
    for model, message in ((tmp_path / "biogpt", "'biogpt' is not supported"), ("nobody/nothing", "nobody/nothing")):
        code, _, err = cli("prune", "-m", model, tmp_path / "out")

        assert code == 1 and message in err and "Traceback" not in err


def test_an_output_folder_in_use_fails_before_the_model_is_loaded(cli, source, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with monkeypatch.context() as patch:
        patch.setattr(FwdPruner, "from_pretrained", lambda *_, **__: pytest.fail("loaded the model"))
        code, _, err = cli("prune", "-m", source, tmp_path / "out")
    assert code == 1 and "is not empty. Name another folder, or pass --overwrite" in err

    assert cli("prune", "-m", source, tmp_path / "out", "--overwrite", "--method", "random")[0] == 0
    assert not (tmp_path / "out/mine").exists()


def test_inspecting_what_is_not_there_is_an_error(cli, source, tmp_path):
    code, _, err = cli("inspect", source, "--history")
    assert code == 1 and "the model is dense, was pruned with another tool, or its units were not scored" in err

    code, _, err = cli("inspect", tmp_path / "nothing")
    assert code == 1 and "Traceback" not in err


def test_damaged_checkpoints_end_in_one_readable_line(cli, source, tmp_path):
    """Whoever raises the error: truncated weights, a config that is no JSON, a tokenizer that is none."""
    for name, damage in (
        ("model.safetensors", lambda content: content[: len(content) // 2]),
        ("model.safetensors", lambda content: b"\xff" * 64),
        ("config.json", lambda content: content[:40]),
        ("config.json", lambda content: b"[]"),
        ("config.json", lambda content: content.replace(b'"hidden_size": 48', b'"hidden_size": "x"')),
    ):
        broken = tmp_path / "broken"
        shutil.copytree(source, broken)
        (broken / name).write_bytes(damage((broken / name).read_bytes()))
        code, _, err = cli("prune", "-m", broken, tmp_path / "out", "--method", "random")

        assert code == 1 and "Traceback" not in err, (name, err)
        assert not (tmp_path / "out").exists()
        shutil.rmtree(broken)


def test_without_a_word_on_how_it_is_the_balanced_preset(cli, source, tmp_path):
    few = ["--calibration", "builtin", "--n_samples", 4, "--seq_len", 32]
    for folder, options, expected in (
        ("default", ["--sparsity", 0.3], PruningConfig.from_preset("balanced", sparsity=0.3)),
        ("asked", ["--scope", "global"], PruningConfig(scope="global")),
    ):
        code, _, error = cli("prune", "-m", source, tmp_path / folder, *options, *few)
        assert code == 0, error
        found = PruningConfig.from_pretrained(tmp_path / folder)
        assert found == dataclasses.replace(expected, calibration="builtin", n_samples=4, seq_len=32)


def test_python_and_the_command_line_mean_the_same_by_nothing(source, tmp_path):
    pruner = FwdPruner.from_pretrained(source)
    pruner.prune(dataset=["some text that is long enough. " * 2000])
    assert pruner.config == PruningConfig.from_preset("balanced", n_samples=128)
