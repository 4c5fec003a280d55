"""How a command can end. Every user-facing failure is an `LdmError`; `cli.main` turns it into one line and a code."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes; the table in README.md says the same in words."""

    OK = 0
    FAULT = 1
    USAGE = 2
    INPUT = 3
    MODEL = 4
    DIVERGED = 5
    RESOURCE = 6
    THRESHOLD = 8
    SIGINT = 130
    SIGTERM = 143


class LdmError(Exception):
    """A failure whose message is one line for a person: what is wrong, where, what to do.

    said_by_rank_0: whether all processes end by it, of which this one need not say it again.
    """

    code: ExitCode = ExitCode.FAULT
    said_by_rank_0 = False


class UsageError(LdmError):
    """The command line or the configuration is wrong."""

    code = ExitCode.USAGE


class InputError(LdmError):
    """Data, captions, labels, images, references or weights that a metric needs are missing or unusable."""

    code = ExitCode.INPUT


class ModelError(LdmError):
    """A model, run or checkpoint is refused: missing, damaged, unsafe, or not fitting the settings."""

    code = ExitCode.MODEL


class DivergedError(LdmError):
    """Training produced NaN or Inf for more steps in a row than allowed."""

    code = ExitCode.DIVERGED


class ResourceError(LdmError):
    """Memory, disk or a process was lost."""

    code = ExitCode.RESOURCE


class ThresholdError(LdmError):
    """A metric missed the limit that the user gave."""

    code = ExitCode.THRESHOLD


class Interrupted(LdmError):
    """A signal ended the command after its state was saved. `signal_number` is SIGINT's or SIGTERM's."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.code = ExitCode.SIGTERM if signal_number == 15 else ExitCode.SIGINT
