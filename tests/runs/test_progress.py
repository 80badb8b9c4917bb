"""How far long stages are: bars on terminals and in notebooks, lines elsewhere, silence where it is asked for."""

import importlib
import io
import logging
import sys
from types import SimpleNamespace

import pytest
import tiny
import tqdm
import transformers

from optimum_fwdprune import FwdPruner, PruningConfig
from optimum_fwdprune.runs.progress import INTERVAL, one_step, progress


module = importlib.import_module("optimum_fwdprune.runs.progress")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test adds to them."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_file_gets_the_stage_the_share_done_and_the_time_left(capsys, clock):
    for _ in progress(range(40), "Calibrating", unit="batch"):
        clock.seconds += 10

    assert capsys.readouterr().err.splitlines()[:3] == [
        "Calibrating: 0 of 40 batches (0%)",
        "Calibrating: 2 of 40 batches (5%), 0:20 elapsed, 6:20 left",
        "Calibrating: 4 of 40 batches (10%), 0:40 elapsed, 6:00 left",
    ]


def test_the_last_line_of_a_file_tells_how_long_a_stage_took(capsys, clock):
    for _ in progress(range(3), "Reconstructing", unit="layer"):
        clock.seconds += 1300

    assert capsys.readouterr().err.splitlines()[-1] == "Reconstructing: 3 of 3 layers (100%), 1:05:00 elapsed"


def test_a_resumed_stage_counts_what_was_done_before_but_not_its_time(capsys, clock):
    for _ in progress(range(30, 40), "Drawing", total=40, unit="draw", initial=30):
        clock.seconds += INTERVAL

    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["Drawing: 30 of 40 draws (75%)", "Drawing: 31 of 40 draws (78%), 0:15 elapsed, 2:15 left"]


def test_an_inner_stage_has_lines_only_where_it_takes_long(capsys, clock):
    for seconds in progress((0, 2 * INTERVAL), "Outer"):
        for _ in progress(range(2), "Inner"):
            clock.seconds += seconds

    inner = [line for line in capsys.readouterr().err.splitlines() if "Inner" in line]
    assert inner == [
        "Inner: 1 of 2 steps (50%), 0:30 elapsed, 0:30 left",
        "Inner: 2 of 2 steps (100%), 1:00 elapsed",
    ]


def test_an_error_in_a_stage_is_the_users_and_the_next_stage_has_its_lines(capsys):
    with pytest.raises(ZeroDivisionError), one_step("Verifying"):
        raise ZeroDivisionError
    with one_step("Writing"):
        pass

    assert capsys.readouterr().err.splitlines() == ["Verifying", "Writing"]


def test_a_closed_pipe_does_not_end_the_work(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: False, write=closed.write, flush=closed.flush))

    assert list(progress(range(3), "Calibrating")) == [0, 1, 2]


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = progress(range(3), "Calibrating", unit="batch")

    assert isinstance(bar, tqdm.tqdm) and list(bar) == [0, 1, 2]
    assert "Calibrating: 100%" in sys.stderr.getvalue()


def test_only_the_outer_bar_stays_in_a_notebook(monkeypatch):
    monkeypatch.setattr(module, "_in_notebook", lambda: True)
    outer = progress(range(1), "Outer")
    bars = [outer, progress(range(1), "Inner")]

    assert [bar.leave for bar in bars] == [True, False]
    for bar in reversed(bars):
        bar.close()
    assert progress((), "Next").leave


@pytest.mark.parametrize("stream", [io.StringIO, Terminal], ids=["file", "terminal"])
@pytest.mark.parametrize("why", ["progress bars are off", "errors only", "the library's own level", "another rank"])
def test_nothing_is_shown_where_nobody_wants_it(monkeypatch, stream, why):
    monkeypatch.setattr(sys, "stderr", stream())
    verbosity, library = transformers.logging.get_verbosity(), logging.getLogger("optimum_fwdprune")
    try:
        if why == "progress bars are off":
            transformers.logging.disable_progress_bar()
        elif why == "errors only":
            transformers.logging.set_verbosity_error()
        elif why == "another rank":
            monkeypatch.setenv("RANK", "1")
        else:
            library.setLevel(logging.ERROR)
        assert list(progress(range(3), "Calibrating")) == [0, 1, 2]
        assert sys.stderr.getvalue() == ""
    finally:
        transformers.logging.enable_progress_bar()
        transformers.logging.set_verbosity(verbosity)
        library.setLevel(logging.NOTSET)


STAGES = {
    "wanda_sp": ["Calibrating", "Reconstructing", "Running the masked model", "Cutting", "Verifying the pruned model"],
    "policy_gradient": ["Learning masks"],
    "mini_llm": ["Drawing perturbations", "Summing up draws"],
    "taylor": ["Back-propagating"],
    "magnitude": ["Scoring"],
    "search": ["Reconstructing levels", "Running the dense model", "Searching sites, sweep 1", "Comparing widths"],
    "self": ["Sampling text"],
    "rounds": ["Pruning in rounds"],
    "speed": ["Timing widths"],
}
REQUESTS = {
    "search": {"scope": "search", "search_windows": 40},
    "self": {"calibration": "self", "n_samples": 4, "seq_len": 8},
    "rounds": {"rounds": 2},
    "speed": {"target_speedup": 1.05, "latency_tokens": 16},
}


@pytest.mark.parametrize("name", STAGES)
def test_every_long_stage_of_pruning_has_its_lines(name, tokens, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("optimum_fwdprune.planning.timing.median_seconds", tiny.counted_seconds)
    method = name if name not in REQUESTS else "wanda_sp"
    request = {"kinds": ["attention", "mlp"], "method": method, **tiny.SHORT.get(name, {})}
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    config = PruningConfig(**request, **REQUESTS.get(name, {}), reconstruction="least_squares")
    pruner.prune(config, dataset=None if name == "self" else tokens)
    pruner.save_pretrained(tmp_path / "pruned")

    shown = capsys.readouterr().err
    for stage in [*STAGES[name], "Writing the checkpoint"]:
        assert any(line.startswith(stage) for line in shown.splitlines()), (stage, shown)
