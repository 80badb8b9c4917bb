# Every call of optimum-cli imports this file; what is heavy is imported when a command runs.
from optimum_fwdprune.commands.fwdprune import FwdPruneCommand


REGISTER_COMMANDS = [FwdPruneCommand]
