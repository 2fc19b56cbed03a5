"""Paths and URIs as users write them, and the folder of caches."""

import contextlib
import os
import re
import stat
import tempfile
from pathlib import Path
from urllib.parse import unquote

from job.errors import UserError

_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<braced>\w+)\}|(?P<name>[A-Za-z_]\w*))", re.ASCII)

_USER_INFO = (
    r"((?:(?<=\bs3://)|(?<=http://)|(?<=https://))[^/?#\s]*"  # of these, a name without a password may be a token
    r"|(?<=://)[^/?#@:\[\s]*:(?!\d*[/?#])[^@\s]*)(?=@)"  # name:password, with slashes perhaps, and not host:port
)
_SENSITIVE_NAME = r"[^=&\s]*(?:secret|token|passw|pwd|signature|credential|key|\bsig|\bsas|\bauth)[^=&\s]*"
_SENSITIVE_PARAMETER = rf"(?<=[?&;#])({_SENSITIVE_NAME}=)[^&\s\"']*"


def is_uri(source: str) -> bool:
    """Returns whether the text is a URI (``s3://bucket/runs``) and not a local path."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source))


def expand_path(source: str) -> str:
    """Expands ``~`` and ``$NAME``, so that a cluster can set where runs are stored: ``run.storage = $RUNS``.

    ``$$`` is a dollar. If the part of the path up to its last dollar exists, all dollars are literal.

    Raises:
        UserError: if a variable is not set, or a character is NUL
    """
    if "\0" in source:
        raise UserError("contains a NUL character")
    source = os.path.expanduser(source)
    head, dollar, tail = source.rpartition("$")
    if dollar and os.path.lexists(f"{head}${tail.partition('/')[0]}"):
        return source
    return os.path.expanduser(_VARIABLE.sub(_expand_variable, source))


def _expand_variable(match: re.Match[str]) -> str:
    name = match["braced"] or match["name"]
    if name and name not in os.environ:
        raise UserError(f"the environment variable {name} is not set", "set it, or write $$ for a dollar")
    return os.environ[name] if name else "$"


def escape_dollars(path: str) -> str:
    """Returns the text that ``expand_path`` expands to a path."""
    return path.replace("$", "$$")


def unescape_stored(text: str) -> str:
    """Returns the path that a stored configuration names; early versions stored it as the user wrote it."""
    return os.path.expanduser(text.replace("$$", "$"))


def check_no_credentials(name: str, text: str) -> None:
    """Raises UserError, which does not contain the text, if it contains a URI with credentials.

    Args:
        name: what the text is given for, such as ``run.storage``
        text: any text
    """
    uri = "".join(unquote(text).split())
    if "://" in uri and re.search(f"{_USER_INFO}|{_SENSITIVE_PARAMETER}", uri, re.IGNORECASE):
        remedy = (
            "give them by the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), ~/.aws/credentials "
            "or an instance role, those of a web server in ~/.netrc"
        )
        raise UserError(f"{name}: a URI with credentials would be stored and shown", remedy)


def mask_credentials(text: str) -> str:
    """Replaces credentials in the URIs of a message, which may be those of an early version's run or a redirect."""
    text = re.sub(_USER_INFO, "***", text, flags=re.IGNORECASE)
    return re.sub(_SENSITIVE_PARAMETER, r"\1***", text, flags=re.IGNORECASE)


def cache_folder() -> Path:
    """Returns the folder of caches, which exists: ``lanes`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``.

    If neither can be written, it is a temporary folder that only this user can write.

    Raises:
        OSError: there is no such folder either
    """
    if folder := _home_cache():
        return folder
    folder = _temporary_cache()
    folder.mkdir(mode=0o700, exist_ok=True)
    if not is_private(folder):
        raise PermissionError(f"{folder} belongs to another user, or others may write it")
    return folder


def _temporary_cache() -> Path:
    return Path(tempfile.gettempdir(), f"lanes-{os.geteuid()}")


def _home_cache() -> Path | None:
    home = os.path.expanduser("~")
    parents = [os.environ.get("XDG_CACHE_HOME"), None if home in ("~", str(_temporary_cache())) else f"{home}/.cache"]
    for folder in (Path(parent, "lanes") for parent in parents if parent):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
    return None


def cache_notice() -> str:
    """Returns a notice if caches are in a temporary folder. Empty otherwise."""
    if _home_cache():
        return ""
    return f"there is no home folder that can be written: caches are in {_temporary_cache()}; set XDG_CACHE_HOME"


def is_private(path: Path) -> bool:
    """Returns whether a file or folder is this user's, who alone may write it, and no symbolic link."""
    status = path.lstat()
    return not stat.S_ISLNK(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
