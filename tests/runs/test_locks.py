"""Folders that two processes name: one run at a time writes to them, and the other is refused or waits."""

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
import tiny

from optimum_fwdprune import FwdPruner, RecoveryArguments
from optimum_fwdprune.loading import origin
from optimum_fwdprune.loading.origin import Origin
from optimum_fwdprune.recovery import finetuning
from optimum_fwdprune.runs import locks


HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another_process(lock):
    """Let another process hold a lock until its stdin is closed."""
    lock.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process


@pytest.fixture
def while_waiting(monkeypatch):
    """Calls a function as soon as a run says that it waits."""
    messages = []

    def set_up(react):
        def warning(text, *values):
            messages.append(text % values)
            react()

        monkeypatch.setattr(locks.logger, "warning", warning)
        return messages

    return set_up


def score(folder, tokens):
    FwdPruner(tiny.make_model("llama_gqa_biases")).score(dataset=tokens, resume=str(folder))


def prune(folder, tokens):
    FwdPruner(tiny.make_model("llama_gqa_biases")).prune(dataset=tokens, resume=str(folder))


def recover(folder, tokens):
    pruned(tokens).recover(tokens, arguments(folder))


def pruned(tokens):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(dataset=tokens)
    return pruner


def arguments(folder, **options):
    return RecoveryArguments(str(folder), **{"mode": "full", "max_steps": 1, "use_cpu": True, **options})


@pytest.mark.parametrize("run, option", [(score, "resume"), (prune, "resume"), (recover, "output_dir")])
def test_a_folder_that_another_process_holds_is_refused(run, option, tokens, tmp_path):
    folder = tmp_path / "shared"
    with held_by_another_process(folder / locks.LOCK) as process:
        with pytest.raises(BlockingIOError, match=rf"Another run is using the folder {folder}\. .*{option}"):
            run(folder, tokens)
        # A process that is killed lets go of it.
        process.kill()
    run(folder, tokens)

    assert not (folder / locks.LOCK).exists()


def test_of_two_runs_that_keep_predictions_one_asks_the_teacher(tokens, tmp_path, while_waiting, monkeypatch):
    pruner = pruned(tokens)
    teacher, kept = tiny.make_model("llama_gqa_biases", seed=1), tmp_path / "kept"
    distilling = {"mode": "distill", "teacher_cache": str(kept)}
    pruner.recover(tokens, arguments(tmp_path / "first", **distilling), teacher=teacher)
    kept.rename(tmp_path / "written")

    with held_by_another_process(tmp_path / f".kept{locks.LOCK}") as process:

        def finish():
            (tmp_path / "written").rename(kept)
            process.stdin.close()

        messages = while_waiting(finish)
        monkeypatch.setattr(finetuning, "keep_predictions", lambda *_: pytest.fail("The teacher was asked again."))
        pruner.recover(tokens, arguments(tmp_path / "second", **distilling), teacher=teacher)

    assert messages == [f"Waiting for another process that is using {kept}."]
    assert not (tmp_path / f".kept{locks.LOCK}").exists()


def test_of_two_processes_that_remember_a_folder_none_loses_that_of_the_other(tmp_path, while_waiting, monkeypatch):
    monkeypatch.setattr(origin, "REMEMBERED", str(tmp_path))
    memory = tmp_path / "abc.json"

    with held_by_another_process(tmp_path / f".abc.json{locks.LOCK}") as process:

        def finish():
            memory.write_text(json.dumps(["/theirs"]))
            process.stdin.close()

        while_waiting(finish)
        Origin("model", "abc", folders=(tmp_path / "ours",)).remember()

    assert json.loads(memory.read_text()) == [str(tmp_path / "ours"), "/theirs"]


def test_a_run_lets_go_of_its_folder_when_it_fails(tmp_path):
    with pytest.raises(RuntimeError), locks.held(tmp_path / "shared", "another"):
        assert (tmp_path / "shared" / locks.LOCK).exists()
        raise RuntimeError

    assert not list((tmp_path / "shared").iterdir())
