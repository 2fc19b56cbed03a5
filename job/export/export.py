"""Writes a trained model as a folder for programs that do not have this one: ``onnx``, or ``hub`` for Hugging Face."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from job.config.model import BUILTIN_CELLS
from job.config.schema import Config
from job.config.section import unknown_name
from job.errors import UserError, error_origin, report_os_error
from job.export.model_card import model_card
from job.export.onnx_graph import state_sizes
from job.export.onnx_model import check_can_export, import_onnx, onnx_file
from job.inference.generate import generate_text, load_model
from job.nn.adaptive_softmax import resolve_cutoffs
from job.paths import expand_path, is_uri
from job.storage import Folder
from job.training.checkpoint import FileContents, LoadedCheckpoint
from job.training.tensor_file import tensor_file

FORMATS = ("onnx", "hub")


def check_export(file_format: str, output: str) -> Path:
    """Returns the folder that an export creates, ``$NAME`` and ``~`` expanded.

    Raises:
        UserError: there is no such format, it needs a library that is not installed, or the folder is not empty or is
            not on a disk
    """
    if file_format not in FORMATS:
        raise unknown_name("--format", file_format, FORMATS)
    if file_format == "onnx":
        import_onnx()
    with error_origin("--output"):
        folder = Path(os.path.realpath(expand_path(output)))  # what a link points to is replaced, not the link
    if not output or is_uri(output):
        raise UserError(f"--output {output}: is not a local folder", "give the path of a new one")
    with report_os_error(f"--output {output}: cannot be read"):
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"--output {output}: exists and is not an empty folder", "choose another folder")
    return folder


def export_model(loaded: LoadedCheckpoint, config: Config, file_format: str, folder: Path) -> list[str]:
    """Writes a folder with a model, its vocabulary and its description. It is complete or absent.

    Returns the names of its files.

    Args:
        loaded: the checkpoint
        config: its configuration, with ``evaluate.weights``, and the cell of ``model`` as the user gave it
        file_format: one of ``FORMATS``
        folder: from ``check_export``

    Raises:
        UserError: the cell or the size of the model is not supported, the folder cannot be written, or as
            ``load_model`` and ``onnx_file``
    """
    contents = (_onnx_files if file_format == "onnx" else _hub_files)(loaded, config)
    contents[loaded.vocabulary.file_name] = [loaded.vocabulary.to_json().encode()]
    with report_os_error(f"--output {folder}: cannot be written"), _new_folder(folder) as temporary:
        for name, parts in contents.items():
            Folder(str(temporary)).write(name, *parts)
    return [*contents]


def _onnx_files(loaded: LoadedCheckpoint, config: Config) -> FileContents:
    model_config = loaded.config.model
    check_can_export(model_config)
    data = onnx_file(load_model(loaded, config.model, config.evaluate.weights).eval(), model_config)
    description = {**_describe(loaded, config), "dtype": "float32", "state": state_sizes(model_config)}
    return {"model.onnx": [data], "config.json": _json(description)}


def _hub_files(loaded: LoadedCheckpoint, config: Config) -> FileContents:
    weights, run = loaded.select_weights(config.evaluate.weights), loaded.config.run.name
    is_builtin = loaded.config.model.cell in BUILTIN_CELLS
    can_generate = is_builtin or loaded.config.model.cell == config.model.cell
    sample = generate_text(loaded, config) if can_generate else None
    card = model_card(loaded, run, "average" if weights is loaded.average else "raw", config.generate.prefix, sample)
    code: FileContents = {"model.py": [(files(__package__) / "hub_model.py").read_bytes()]} if is_builtin else {}
    return {
        "model.safetensors": tensor_file(weights, {"format": "pt"}),
        "config.json": _json(_describe(loaded, config)),
        "README.md": [card.encode(errors="replace")],
        **code,
    }


def _describe(loaded: LoadedCheckpoint, config: Config) -> dict[str, Any]:
    """Returns what a reader of the weights needs: the model, and how ``generate`` uses it."""
    model, vocabulary, unknown = loaded.config.model, loaded.vocabulary, loaded.vocabulary.unknown_id
    return {
        "model_type": "lanes",
        "cell": model.cell,
        "hidden_size": model.layer_sizes,
        "embedding_size": model.embedding_size,
        "tied": model.tied,
        "adaptive_cutoffs": resolve_cutoffs(model, len(vocabulary)),
        "vocabulary_size": len(vocabulary),
        "vocabulary": vocabulary.file_name,
        "cleaning": loaded.config.corpus.cleaning,
        "reset_token": vocabulary.reset_token(loaded.config.corpus),
        "suppress_tokens": [] if unknown is None or config.generate.unknown else [unknown],
    }


def _json(values: dict[str, Any]) -> list[bytes | memoryview]:
    return [json.dumps(values, indent=1).encode()]


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder, which gets its name at the end of the block unless that raises."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        temporary.mkdir(parents=True)
        if folder.exists():
            shutil.copymode(folder, temporary)  # which may be private
        yield temporary
        temporary.rename(folder)  # also in place of an empty folder
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise
