"""What can go wrong, and by whose choice; every message says what arrived and what to try."""


class NgpluginError(Exception):
    """Base class of every error this package raises on purpose."""


class OptionError(NgpluginError, ValueError):
    """An option has a value that cannot work; raised where the option was given."""


class LikelihoodError(NgpluginError, ValueError):
    """A declared distribution is none of the model's predictions."""


class StepOrderError(NgpluginError, RuntimeError):
    """Something was asked for before what it needs: a step before its observation, for one."""


class DamagedStateError(NgpluginError, ValueError):
    """A saved state is not what was saved; nothing of it was taken over."""


class UnsupportedTrainerError(NgpluginError, RuntimeError):
    """A trainer setting that natural gradient cannot follow, with what to do instead."""
