"""A race against tuned optimizers, by the processor's time: `python -m experiments.race`.

`courses` say what is trained, `contestants` and `peers` who trains it, `search` finds their
settings, `running` lets them train in turns, `memory` counts what they hold, `results` keeps and
judges what was measured, `page` and `figure` show it.
"""
