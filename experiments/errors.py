"""What goes wrong in a way the reader of the terminal can mend: one line, and an exit status."""


class ExperimentError(ValueError):
    """A mistake told in one line: what (file or argument), what was expected, what was got.

    `status` is what the process exits with: 1 while running, 2 for a wrong command line.
    """

    status = 1


class UsageError(ExperimentError):
    """The command line cannot mean anything: unknown name, number out of range, options that clash."""

    status = 2


class DataError(ExperimentError):
    """A data file is missing, truncated, corrupt, of the wrong kind or not what was promised."""


class CheckpointError(ExperimentError):
    """A weights file is missing, corrupt or not the weights of this net."""


class RunError(ExperimentError):
    """The run itself cannot start or go on: no place for its results, gradients that differ, a loss not finite."""
