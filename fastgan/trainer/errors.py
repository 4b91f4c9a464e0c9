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


def reason(error: BaseException) -> str:
    """Return what went wrong in one line, without the number and the path of a system's error."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(words).partition("\n")[0]
