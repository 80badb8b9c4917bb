"""The wheel: it holds every file of the package, and what is installed from it prunes a model."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny

import optimum_fwdprune


PACKAGE = Path(optimum_fwdprune.__file__).parent
ROOT = PACKAGE.parent

# `optimum-cli` finds its subcommands in this folder of its own package.
REGISTER = "optimum_fwdprune/commands/register/"

PRUNE = """
import torch
import optimum_fwdprune
from optimum_fwdprune import FwdPruner

pruner = FwdPruner.from_pretrained("dense")
pruner.prune(dataset=torch.arange(96).view(4, 24), sparsity=0.3)
pruner.save_pretrained("pruned")
print(optimum_fwdprune.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of what the build reads, so that nothing is written into the checkout."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", output, source)
    return next(output.glob("*.whl"))


def pip(*arguments):
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_wheel_holds_every_file_of_the_package(wheel):
    """Setuptools leaves out what setup.cfg does not list, without a word."""
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    expected = {path.relative_to(ROOT).as_posix().replace(REGISTER, "optimum/commands/register/") for path in files}
    names = set(zipfile.ZipFile(wheel).namelist())

    assert expected == {name for name in names if ".dist-info/" not in name}
    assert expected >= {f"optimum_fwdprune/{name}" for name in ("py.typed", "report/page.css", "report/page.html")}


def test_what_is_installed_from_the_wheel_prunes_a_model(wheel, tmp_path, make_environment):
    python = make_environment(tmp_path / "environment")
    # The egg-info of the checkout, or the environment of the tests, would pass for an installation of the wheel.
    pip("--python", python, "install", "--no-deps", "--no-index", "--ignore-installed", wheel)
    tiny.make_model("llama_gqa_biases").save_pretrained(tmp_path / "dense")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}

    pruned = subprocess.run([python, "-c", PRUNE], **run)
    shown = subprocess.run([python, "-m", "optimum.commands.optimum_cli", "fwdprune", "--help"], **run)

    assert pruned.returncode == 0, pruned.stderr[-3000:]
    assert Path(pruned.stdout.strip()).is_relative_to(tmp_path / "environment")
    assert (tmp_path / "pruned" / "model.safetensors").is_file()
    assert "prune" in shown.stdout and "recover" in shown.stdout
