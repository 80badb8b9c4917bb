"""What importing the package costs, in milliseconds of fresh processes.

    python benchmarks/imports.py

Targets: importing the package takes less than 50 ms and does not import torch; transformers' Auto classes then take at
most 50 ms more than without it. A family is imported when a model of it is met; the time of that is measured for all
families together. Times are those of the processor, and torch is imported before transformers is timed: other work on
the machine then changes them least.
"""

import argparse
import statistics
import subprocess
import sys

from optimum_fwdprune.report import render_table


AUTO_CLASSES = "from transformers import AutoModelForCausalLM"
# What is measured -> what runs before it in the same process, and what is timed.
TIMED = {
    "the package": ("import sys, time", "import optimum_fwdprune\nassert 'torch' not in sys.modules"),
    "Auto classes": ("import torch, time", AUTO_CLASSES),
    "Auto classes after the package": ("import torch, time, optimum_fwdprune", AUTO_CLASSES),
    "all families": (
        f"import time, optimum_fwdprune\n{AUTO_CLASSES}\nimport optimum_fwdprune.architectures as architectures",
        "architectures.registered_architectures()",
    ),
}


def milliseconds(before, timed):
    """Return the milliseconds of processor time that the code `timed` takes in a process that ran `before`."""
    code = f"{before}\nstart = time.process_time()\n{timed}\nprint(1000 * (time.process_time() - start))"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats

    # All take turns, so that a machine that grows slower does so for all of them.
    rounds = [{name: milliseconds(*code) for name, code in TIMED.items()} for _ in range(repeats)]
    times = {name: [measured[name] for measured in rounds] for name in TIMED}
    with_package, without = (times[name] for name in ("Auto classes after the package", "Auto classes"))
    times["Auto classes, added by the package"] = [
        longer - shorter for longer, shorter in zip(with_package, without, strict=True)
    ]
    targets = {"the package": "< 50", "Auto classes, added by the package": "<= 50"}
    rows = [
        (name, f"{statistics.median(values):.1f}", f"{min(values):.1f} to {max(values):.1f}", targets.get(name, ""))
        for name, values in times.items()
    ]
    print(render_table(("import, ms", "median", "range", "target"), rows))


if __name__ == "__main__":
    main()
