"""Reading configuration files, from a disk or an object store."""

from collections.abc import Mapping
from pathlib import Path

from job.config.schema import Config
from job.config.search_space import SearchConfig
from job.config.toml import ConfigValues, build_sections, decode_toml, expand_paths, parse_config, parse_flags
from job.errors import UserError, error_origin
from job.paths import is_uri
from job.storage import Folder


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
    with error_origin(origin):
        sections, search = build_sections(values | overrides)
    return Config(*sections), search


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
