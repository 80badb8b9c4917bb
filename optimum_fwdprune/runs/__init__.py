"""One run on one machine or several: processes, devices, random numbers, the clock, progress, logs and kept states."""
