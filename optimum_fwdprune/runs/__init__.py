"""Processes, devices, random numbers, clocks, progress, logs, locks and stored states of a run."""
