"""Reading configuration files, from a disk or an object store."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from job.config.model import BUILTIN_CELLS
from job.config.run import RunConfig
from job.config.schema import Config
from job.config.search_space import SearchConfig
from job.config.toml import (
    ConfigValues,
    build_sections,
    config_from_toml,
    decode_toml,
    expand_paths,
    parse_config,
    parse_flags,
)
from job.errors import UserError, error_origin
from job.paths import is_uri
from job.storage import Folder

CONFIG_FILE = "config.toml"  # the resolved configuration of a run or checkpoint
_MAX_FILE_BYTES = 1 << 20  # of a stored configuration
_NOT_INHERITED = ("run.name", "run.storage", "run.resume", "run.resume_from")


def load_config(path: str | None, flags: Mapping[str, str]) -> Config:
    """Returns the configuration of a run: see ``load_search_config``."""
    return load_search_config(path, flags)[0]


def load_search_config(path: str | None, flags: Mapping[str, str]) -> tuple[Config, SearchConfig]:
    """Returns the configuration and the search of a file, overridden by flags.

    Args:
        path: a file or a URI; None: the defaults
        flags: texts by full field name, such as ``model.cell``

    Raises:
        UserError: if the file cannot be read, or a field or value is invalid
    """
    return build_config(path, parse_flags(flags), "command line")


def build_config(path: str | None, overrides: ConfigValues, origin: str) -> tuple[Config, SearchConfig]:
    """Returns the configuration and the search of a file, overridden by values whose origin messages name."""
    values: ConfigValues = {}
    if path is not None:
        text = _read_text(path)
        with error_origin(path):
            values = expand_paths(parse_config(text))
            build_sections(values)
    values |= overrides
    inherited = _inherited_values(values)
    with error_origin(origin):
        sections, search = build_sections(inherited | values)
    return Config(*sections), search


def _inherited_values(values: ConfigValues) -> ConfigValues:
    """Returns the configuration of the checkpoint or run that ``run.resume_from`` names, without its name and storage.

    Once the new run exists, its own configuration takes that place, since the checkpoint may be gone.
    """
    source, name = values.get("run.resume_from"), values.get("run.name")
    if not source or not isinstance(source, str):
        return {}
    config = None
    if name and isinstance(name, str):
        with suppress(UserError):  # it is reported when the run is looked up
            config = read_config(Folder.resolve(str(values.get("run.storage", RunConfig.storage))) / name)
    with error_origin(f"run.resume_from = {source}"):
        if not config or config.run.resume_from != source:
            config = read_config(Folder.resolve(source))
        if not config:
            raise UserError("neither a run nor a checkpoint", "give the folder of one, such as runs/seed-1")
        cell = config.model.cell
        if cell not in BUILTIN_CELLS and "model.cell" not in values:
            problem = f"model.cell = {cell}: code named by a file is not imported"
            raise UserError(problem, f"if you trust it, add --model.cell {cell}")
    return {name: value for name, value in config.values().items() if name not in _NOT_INHERITED}


def read_config_text(folder: Folder, name: str = CONFIG_FILE) -> str | None:
    """The text of a stored configuration, or None if the file does not exist."""
    try:
        return decode_toml(folder.read(name, _MAX_FILE_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder}/{name}: cannot be read: {error}") from None


def read_config(folder: Folder) -> Config | None:
    """The configuration of a run or checkpoint, or None if there is none. Raises UserError if it cannot be read."""
    text = read_config_text(folder)
    return None if text is None else config_from_toml(text, f"{folder}/{CONFIG_FILE}")


def _read_text(path: str) -> str:
    try:
        if is_uri(path):  # for example a search's best.toml
            file = Folder.resolve(path)
            return decode_toml(file.parent.read(file.name))
        return decode_toml(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not {error.encoding} text at byte {error.start}", "convert it to UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a configuration: {error}") from None
