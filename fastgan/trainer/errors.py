"""Errors that the user can fix. The command line prints them in one line, without a traceback."""


class TrainerError(RuntimeError):
    """The run cannot start or continue; the message says why and what to do."""


class DataError(TrainerError):
    """Training data is missing or damaged."""


class RunFolderError(TrainerError):
    """The run folder already exists, or contains nothing to resume."""


class CheckpointError(TrainerError):
    """A checkpoint cannot be read or written."""


class NonFiniteLossError(TrainerError):
    """A loss became infinite or NaN."""
