"""What may go wrong, by who can mend it."""


class UserError(ValueError):
    """Something that the user can mend, told in one line: the value, the place, the remedy.

    The command line prints it as ``error: …`` and ends with status 2.
    """


class RunFailed(RuntimeError):
    """A run that ended by itself before its end, told in one line. Status 1."""


class UnrecoverableError(RunFailed):
    """A run that would fail again."""


class Diverged(UnrecoverableError):
    """The loss is no longer a finite number."""
