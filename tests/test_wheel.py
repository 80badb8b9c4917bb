"""The release: wheel and sdist are complete and valid, and what is installed from the wheel prunes a model."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
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
def source(tmp_path_factory):
    """A copy of what a build reads, so that nothing is written into the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    return source


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """The wheel, built by pip."""
    output = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", output, source)
    return next(output.glob("*.whl"))


@pytest.fixture(scope="module")
def release(source, tmp_path_factory):
    """The folder of the sdist and of the wheel that is built from it."""
    missing = [name for name in ("build", "twine") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} of the extra `tests` are not installed: pip install -e .[tests]")
    output = tmp_path_factory.mktemp("release")
    run_module("build", "--no-isolation", "--outdir", output, source)
    return output


def run_module(*arguments):
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


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


def test_the_release_is_what_an_index_accepts(release):
    version = optimum_fwdprune.__version__
    names = {f"optimum_fwdprune-{version}.tar.gz", f"optimum_fwdprune-{version}-py3-none-any.whl"}

    assert {file.name for file in release.iterdir()} == names
    run_module("twine", "check", "--strict", *release.iterdir())


def test_the_sdist_holds_the_package_its_licence_and_the_changelog(release):
    with tarfile.open(next(release.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}

    assert files <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "setup.cfg", "pyproject.toml"} <= names


def test_the_changelog_describes_this_version():
    """The form of keepachangelog.com: versions with dates, newest first, and the kinds of changes below them."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    kinds = set(re.findall(r"^### (.*)$", text, flags=re.MULTILINE))

    assert versions[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(optimum_fwdprune.__version__)}\] - \d{{4}}-\d\d-\d\d", versions[1])
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


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
