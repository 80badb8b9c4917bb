"""One run on one machine or several: processes, devices, randomness, clock, progress, logs, locks and kept states."""
