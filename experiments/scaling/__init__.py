"""What natural gradient costs when distributed, on paper: `python -m experiments.scaling`.

Memory, communication and time of a step, from the shapes of a model, the protocol of the optimizer
and a device's data sheet; what can be measured on a small machine is measured there, and the same
formulas are held against it. `docs/scaling.md` has the formulas, the assumptions and the results.
"""
