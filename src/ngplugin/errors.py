"""What can go wrong, and by whose choice; every message says what arrived and what to try."""


class NgpluginError(Exception):
    """Base class of every error this package raises on purpose."""


class OptionError(NgpluginError, ValueError):
    """An option has a value that cannot work; raised where the option was given."""


class LikelihoodError(NgpluginError, ValueError):
    """A declared distribution is none of the model's predictions."""


class StepOrderError(NgpluginError, RuntimeError):
    """A step was asked for before the training step it belongs to was observed."""


class UnsupportedTrainerError(NgpluginError, RuntimeError):
    """A trainer setting that natural gradient cannot follow, with what to do instead."""
