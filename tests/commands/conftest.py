"""The command line, run in this process."""

import sys

import pytest
from optimum.commands.optimum_cli import main


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run a command in this process; returns `(exit code, stdout, stderr)`."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "fwdprune", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as error:
            code = error.code
        return (code, *capsys.readouterr())

    return run
