"""Errors that a user can act on; the command line prints them in one line, without a traceback."""


class TrainerError(RuntimeError):
    """The run cannot start or go on; the message says why and what to do."""


class DataError(TrainerError):
    """Training data is missing or damaged."""


class RunFolderError(TrainerError):
    """The run folder exists already, or holds nothing to resume."""


class CheckpointError(TrainerError):
    """A checkpoint cannot be read."""


class NonFiniteLossError(TrainerError):
    """A loss became infinite or NaN."""
