"""Errors, by who can fix them."""


class _Problem(Exception):
    """A problem and its remedy, as data: nothing parses the message."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}" if self.remedy else self.problem


class UserError(_Problem, ValueError):
    """Invalid input. The command line prints it as one line and exits with status 2.

    Args:
        problem: the place, the value, and what is wrong with it
        remedy: what the user can do about it
    """


class RunFailed(_Problem, RuntimeError):
    """A run that ended before its end. The command line exits with status 1."""


class UnrecoverableError(RunFailed):
    """A run that would fail again if it were retried."""


class Diverged(UnrecoverableError):
    """The loss is no longer a finite number."""
