"""Which small changes of the core the tests notice: `python -m experiments.mutants`."""
