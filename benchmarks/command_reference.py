"""Writes docs/reference/commands.md: every command with every option, from the parsers themselves.

python benchmarks/command_reference.py
"""

import argparse
from pathlib import Path

import pages
from optimum.commands.optimum_cli import RootOptimumCLICommand, register_optimum_cli_subcommand

from optimum_fwdprune.commands.fwdprune import FwdPruneCommand


PAGE = Path(__file__).parent.parent / "docs" / "reference" / "commands.md"
LONGEST_CHOICE = 24
INTRODUCTION = """# Commands

*This page is written by `benchmarks/command_reference.py` from the parsers of the commands.*

`optimum-cli fwdprune COMMAND --help` shows the same. Names of options may be abbreviated. Several values of an option
follow one after the other, such as `--kinds attention mlp`.

"""


def files():
    """The page, by its path."""
    return {PAGE: page()}


def page():
    """The whole page, as Markdown."""
    commands = {info.name: (info.help, info.subcommand_class) for info in FwdPruneCommand.SUBCOMMANDS}
    parsers = parsers_of_commands()
    lines = [f"| [`{name}`](#{name}) | {help} |\n" for name, (help, _) in commands.items()]
    overview = "| command | what it does |\n|---|---|\n" + "".join(lines)
    sections = [section(name, parsers[name], command) for name, (_, command) in commands.items()]
    return INTRODUCTION + overview + "".join(sections)


def parsers_of_commands():
    """The parser of every command, by name."""
    root = RootOptimumCLICommand("Optimum CLI tool", usage="optimum-cli")
    register_optimum_cli_subcommand(FwdPruneCommand, parent_command=root)
    return subparsers(subparsers(root.parser)["fwdprune"])


def subparsers(parser):
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return action.choices


def section(name, parser, command):
    examples = "\n".join(f"optimum-cli fwdprune {example}" for example in command.EXAMPLES)
    parts = [
        f"\n## {name}\n\n```\noptimum-cli fwdprune {name} {command.USAGE} [options]\n```\n",
        f"\n{escaped(command.DESCRIPTION)}\n",
        f"\n<!-- not run: tests/commands/test_help.py parses the examples -->\n```bash\n{examples}\n```\n",
    ]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        if actions:
            parts.append(f"\n**{group.title[0].upper()}{group.title[1:].rstrip(':')}**\n")
            if group.description:
                parts.append(f"\n{listing(group.description)}\n")
            parts.append("\n| option | meaning |\n|---|---|\n" + "".join(row(parser, action) for action in actions))
    return "".join(parts)


def listing(description):
    """A description of several lines is a list of names, which stays as it is."""
    return f"```\n{description.rstrip()}\n```" if "\n" in description else escaped(description)


def row(parser, action):
    """Long sets of values follow the meaning. As part of the option's name they would make the column too wide."""
    values = ""
    if str(action.metavar).startswith("{") and len(action.metavar) > LONGEST_CHOICE:
        values = f" Values: {action.metavar.strip('{}').replace(',', ', ')}."
        action.metavar = "VALUE"
    formatter = parser._get_formatter()
    formatter._width = 10_000
    invocation = formatter._format_action_invocation(action)
    name = invocation.replace("|", "\\|")
    return f"| `{name}` | {escaped(formatter._expand_help(action))}{values} |\n"


def escaped(text):
    """Text in which neither tables nor Markdown see a mark of their own."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    pages.write(files())
