"""Processes in which nothing of Hugging Face was imported yet, without the seconds that importing torch takes.

One process imports torch and other libraries that know neither transformers nor huggingface_hub, and waits. What runs
is a fork of it, with its own environment, arguments and output.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path


SECONDS = 300


class FreshProcesses:
    """Runs code as `python -c` would; `close` ends the process that waits."""

    def __init__(self):
        self._waiting = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, code, environment=None, arguments=("-c",)):
        """Return what `subprocess.run` returns: the exit status, and stdout and stderr as text.

        Args:
            code (`str`): what runs as `__main__`.
            environment (`dict[str, str]`, *optional*, defaults to that of this process): all environment variables.
            arguments (`Sequence[str]`, *optional*): `sys.argv`.
        """
        with tempfile.TemporaryDirectory() as folder:
            job = {
                "code": code,
                "environment": dict(os.environ if environment is None else environment),
                "arguments": list(arguments),
                "output": folder,
                "cwd": os.getcwd(),
            }
            print(json.dumps(job), file=self._waiting.stdin, flush=True)
            status = int(self._waiting.stdout.readline())
            stdout, stderr = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(code, status, stdout, stderr)

    def close(self):
        self._waiting.stdin.close()
        self._waiting.wait()
        self._waiting.stdout.close()


def wait_for_jobs():
    """Fork for every job and answer with its exit status; return the job in the fork, and nothing in the end."""
    for line in sys.stdin:
        if (process := os.fork()) == 0:
            return json.loads(line)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        os.write(1, f"{status}\n".encode())
    return None


def become(job):
    """Make this fork what a process that was just started would be."""
    signal.alarm(SECONDS)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    named = job["environment"].get("PYTHONPATH")
    # Where the interpreter was started with a script, its folder comes first.
    sys.path[:1] = ["", *(named.split(os.pathsep) if named else ())]
    sys.argv = job["arguments"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(job["output"], name), os.O_WRONLY | os.O_CREAT), number)
    return vars(sys.modules["__main__"])


if __name__ == "__main__":
    import pandas  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch._dynamo  # noqa: F401

    assert not {"transformers", "huggingface_hub", "accelerate", "peft", "optimum_fwdprune"} & sys.modules.keys()
    job = wait_for_jobs()
    if job is not None:
        exec(compile(job["code"], "<string>", "exec"), become(job))
