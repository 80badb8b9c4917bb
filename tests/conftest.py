"""Shared fixtures: tiny random models, a tiny tokenizer, and no network."""

import base64
import functools
import gc
import os
import sys
import sysconfig
import venv
from pathlib import Path


# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models gain nothing from threads, and lose much to threads that wait for a busy core.
os.environ["OMP_NUM_THREADS"] = "1"

import optimum.subpackages
import pytest
import tiny
import torch
from fresh import FreshProcesses
from hypothesis import settings


# A picture, PNG.
ONE_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)

# By hand, or every night: `make fuzz`.
settings.register_profile("nightly", max_examples=1000)


@pytest.fixture(scope="session")
def make_environment():
    """Makes a virtual environment with all that is installed here but the package under test; returns its Python."""

    def make(folder):
        venv.EnvBuilder(symlinks=True).create(folder)
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        # In a folder that is named there, the file that an editable installation goes by is not read.
        (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        return folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"

    return make


@pytest.fixture(scope="session")
def python_without_the_package(tmp_path_factory, make_environment):
    """Interpreter of a virtual environment without the package under test."""
    return make_environment(tmp_path_factory.mktemp("without"))


@pytest.fixture(scope="session")
def fresh_processes():
    """Runs code in processes in which neither transformers nor the package under test was imported."""
    processes = FreshProcesses()
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer with 300 entries, without a padding token."""
    return tiny.make_tokenizer()


@pytest.fixture(autouse=True, scope="session")
def remembered(tmp_path_factory):
    """What is remembered of models that were pruned stays out of the user's cache."""
    from optimum_fwdprune.loading import origin as origins

    origins.REMEMBERED = str(tmp_path_factory.mktemp("remembered"))


@pytest.fixture(autouse=True, scope="session")
def packages_are_looked_for_once():
    """optimum's command reads the metadata of all installed packages whenever it starts."""
    with pytest.MonkeyPatch.context() as patch:
        once = functools.cache(optimum.subpackages.load_namespace_modules)
        patch.setattr(optimum.subpackages, "load_namespace_modules", once)
        yield


@pytest.fixture(autouse=True, scope="session")
def same_cpu_everywhere():
    """Training does not depend on the instructions of the machine that the tests run on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        yield


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """The garbage collector, which the package calls, does not go through the modules of all libraries each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_pictures_of_plans(request, monkeypatch):
    """Drawing the card's picture takes longer than all else that saving a tiny model does; the tests of reports and of
    the examples look at real ones."""
    if request.path.parent.name != "report" and request.path.name != "test_examples.py":
        monkeypatch.setattr("optimum_fwdprune.report.card.plot_plan", lambda _plan, file: file.write_bytes(ONE_PIXEL))


@pytest.fixture
def tokens():
    """Calibration tokens: 16 windows of 24."""
    return torch.randint(0, tiny.VOCAB, (16, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=tiny.REPRESENTATIVE)
def architecture_name(request):
    """A tiny architecture of every layout in turn."""
    return request.param


@pytest.fixture
def dense(architecture_name):
    """A dense tiny causal language model of every layout in turn, in eval mode."""
    return tiny.make_model(architecture_name)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tokenizer):
    """A folder with the checkpoints `dense` and `pruned`."""
    import stand_ins

    folder = tmp_path_factory.mktemp("checkpoints")
    stand_ins.save_checkpoints(folder, tokenizer)
    return folder


@pytest.fixture
def workplace(monkeypatch, tmp_path, checkpoints):
    """An empty folder, the current one, where documentation and examples run with stand-ins for what is large."""
    import stand_ins

    from optimum_fwdprune.architectures import registry
    from optimum_fwdprune.models.families import PREFIX, family_modules

    stand_ins.install(monkeypatch, tmp_path, checkpoints)
    before = set(registry._ARCHITECTURES)
    yield tmp_path
    # Other tests must not know the families that an example registers. The package's own stay: their modules, once
    # imported, do not register them again.
    for model_type in set(registry._ARCHITECTURES) - before:
        if model_type.removeprefix(PREFIX) not in family_modules():
            del registry._ARCHITECTURES[model_type]


@pytest.fixture
def device(monkeypatch):
    """The state of a second device, which is the accelerator of the machine; layers take there what they hold."""
    import second_device

    from optimum_fwdprune.planning import timing

    monkeypatch.setattr(timing, "median_seconds", tiny.counted_seconds)
    with second_device.second_device(monkeypatch) as state:
        yield state
