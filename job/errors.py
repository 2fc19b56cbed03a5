"""Errors, by who can fix them."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any


class _Problem(Exception):
    """An error whose problem and remedy are separate fields, so that nothing has to parse its message."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}" if self.remedy else self.problem


class UserError(_Problem, ValueError):
    """Invalid input. The command line prints it as one line and exits with status 2.

    Args:
        problem: the field or file, its value, and what is wrong with it
        remedy: what the user can do about it
    """


class NonFiniteLogits(UserError):
    """A model whose logits are NaN or infinite, of which no token is the most likely one."""


class RunFailed(_Problem, RuntimeError):
    """A run that stopped early. The command line exits with status 1."""


class UnrecoverableError(RunFailed):
    """A run that would fail again if it were retried."""


class Diverged(UnrecoverableError):
    """The loss is no longer a finite number."""


@contextlib.contextmanager
def error_origin(origin: str) -> Iterator[None]:
    """Begins the message of a UserError that is raised in the block with where the input came from."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{origin}: {error.problem}", error.remedy) from None


@contextlib.contextmanager
def report_os_error(problem: str, remedy: str = "") -> Iterator[None]:
    """Raises a UserError in place of an OSError in the block: the problem, and the reason."""
    try:
        yield
    except OSError as error:
        reason, *_ = (error.strerror or str(error) or type(error).__name__).splitlines()
        raise UserError(f"{problem}: {reason}", remedy) from None


def import_optional(package: str, needed_for: str) -> Any:
    """Returns the module of an optional dependency. Raises UserError if it is not installed.

    Args:
        package: its name
        needed_for: a setting and its value, for the message
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{needed_for}: {package} is not installed", f"pip install {package}") from None
