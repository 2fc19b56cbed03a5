"""The Hugging Face hub as a file system of pyarrow: ``hf://datasets/OWNER/NAME/PATH``, which is only read."""

import importlib
import time
from typing import Any

from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

from job.errors import UserError

SCHEME = "hf://"
_CLASSES: dict[int, type[OSError]] = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError}
_RETRY_DELAYS_S = 1.0, 2.0, 4.0


def open_hub(path: str) -> FileSystem:
    """Returns the file system of the hub at ``HF_ENDPOINT``, with the token of ``HF_TOKEN`` or of the hub's own cache.

    Args:
        path: a path in it, whose repository must exist

    Raises:
        UserError: huggingface_hub is not installed, or there is no such repository, or it cannot be reached
    """
    try:
        library = importlib.import_module("huggingface_hub")
    except ImportError:
        raise UserError("huggingface_hub is not installed", "pip install huggingface_hub") from None
    library.logging.set_verbosity_error()  # each retry would be a line on standard error
    hub = library.HfFileSystem(skip_instance_cache=True)  # a cached one has listings as old as the process
    for delay in (*_RETRY_DELAYS_S, None):
        error = _check(hub, path)
        if error is None:
            return PyFileSystem(FSSpecHandler(hub))
        if delay is None or isinstance(error, FileNotFoundError | PermissionError):
            break
        time.sleep(delay)
    raise UserError(str(error), "check the name and the network; for a private data set set HF_TOKEN")


def _check(hub: Any, path: str) -> Exception | None:
    """Requests a repository, which the library does not retry. Returns the error if it fails."""
    try:
        hub.resolve_path(path)
    except (ValueError, NotImplementedError) as error:  # not a path of the hub
        return FileNotFoundError(str(error).splitlines()[0])
    except Exception as error:
        return hub_error(error)
    return None


def hub_error(error: Exception) -> Exception:
    """Returns an error of the library as an OSError of one line, without the URL, which may be signed; others as is."""
    source: Any = error if hasattr(error, "response") else error.__cause__
    response = getattr(source, "response", None)
    if response is not None:
        cls = _CLASSES.get(response.status_code, OSError)
        return cls(f"the hub answers {response.status_code} {response.reason_phrase}")
    if not type(error).__module__.startswith(("httpx", "huggingface_hub")):
        return error
    return OSError(f"the hub cannot be read: {next(iter(str(error).splitlines()), type(error).__name__)}")
