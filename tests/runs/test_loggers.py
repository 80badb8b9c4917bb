"""The loggers of the package: transformers' verbosity governs them, or a level that the user set on them."""

import ast
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import optimum_fwdprune
from optimum_fwdprune.runs.loggers import get_logger


LIBRARY = logging.getLogger("optimum_fwdprune")
SPEAK = """
from optimum_fwdprune.runs.loggers import get_logger
logger = get_logger("optimum_fwdprune.data.calibration")
logger.debug("quiet words"), logger.info("low words"), logger.warning("loud words")
"""


@pytest.fixture(autouse=True)
def levels():
    """The levels before a test are those after it."""
    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    LIBRARY.setLevel(logging.NOTSET)


def run(code, **environment):
    """Run code in a process of its own, and return the lines on stderr that are not those of transformers."""
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if not line.startswith("[transformers]")]


def test_every_module_has_a_logger_of_the_library():
    package = Path(optimum_fwdprune.__file__).parent
    for file in package.rglob("*.py"):
        calls = [ast.unparse(node) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        made = [call for call in calls if "getLogger(" in call or "get_logger(" in call]
        if file.name not in ("loggers.py", "progress.py"):
            assert set(made) <= {"get_logger(__name__)"}, file
        assert not any(call.startswith("warnings.warn(") for call in calls), file


def test_transformers_verbosity_governs():
    logger = get_logger("optimum_fwdprune.data.calibration")

    transformers.logging.set_verbosity_error()
    assert not logger.isEnabledFor(logging.WARNING)
    transformers.logging.set_verbosity_info()
    assert logger.isEnabledFor(logging.INFO) and not logger.isEnabledFor(logging.DEBUG)
    transformers.logging.set_verbosity_warning()
    assert logger.isEnabledFor(logging.WARNING) and not logger.isEnabledFor(logging.INFO)


def test_a_level_of_the_library_or_of_a_module_goes_before_transformers():
    logger = get_logger("optimum_fwdprune.data.calibration")

    transformers.logging.set_verbosity_error()
    LIBRARY.setLevel(logging.DEBUG)
    assert logger.isEnabledFor(logging.DEBUG)
    logger.setLevel(logging.WARNING)
    try:
        assert not logger.isEnabledFor(logging.INFO)
        assert get_logger("optimum_fwdprune.planning.search").isEnabledFor(logging.DEBUG)
    finally:
        logger.setLevel(logging.NOTSET)


def test_handlers_of_the_root_logger_get_every_message(caplog):
    with caplog.at_level(logging.INFO, logger="optimum_fwdprune"):
        get_logger("optimum_fwdprune.data.calibration").info("low words")

    assert caplog.record_tuples == [("optimum_fwdprune.data.calibration", logging.INFO, "low words")]


@pytest.mark.parametrize(
    ("verbosity", "before", "shown"),
    [
        (None, "", ["loud"]),
        ("error", "", []),
        ("info", "", ["low", "loud"]),
        ("debug", "", ["quiet", "low", "loud"]),
        ("info", "import transformers", ["low", "loud"]),
    ],
)
def test_the_variable_of_transformers_governs(verbosity, before, shown):
    environment = {} if verbosity is None else {"TRANSFORMERS_VERBOSITY": verbosity}

    assert run(before + SPEAK, **environment) == [f"[optimum_fwdprune] {word} words" for word in shown]


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("import logging; logging.getLogger('optimum_fwdprune').setLevel(10)", ["quiet", "low", "loud"]),
        ("import logging; logging.getLogger('optimum_fwdprune.data.calibration').setLevel(20)", ["low", "loud"]),
        ("import transformers; transformers.logging.set_verbosity_info()", ["low", "loud"]),
        ("import logging; logging.basicConfig(filename='/dev/null')", ["loud"]),
    ],
)
def test_messages_go_to_stderr_at_the_level_that_was_set_before_the_import(before, expected):
    assert run(before + SPEAK) == [f"[optimum_fwdprune] {word} words" for word in expected]


def test_where_the_root_logger_writes_to_the_console_a_message_is_there_once():
    assert run("import logging; logging.basicConfig(format='mine: %(message)s')" + SPEAK) == ["mine: loud words"]


def test_of_several_processes_the_main_one_speaks():
    assert run(SPEAK, RANK="1", WORLD_SIZE="2") == []
    assert run(SPEAK, RANK="0", WORLD_SIZE="2") == ["[optimum_fwdprune] loud words"]
