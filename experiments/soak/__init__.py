"""The long run with faults: `python -m experiments.soak`."""
