"""The Python API, ``job.train`` and ``job.load``, for notebooks and programs."""

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from signal import SIGINT
from typing import Any

import torch
from matplotlib.figure import Figure

from job.config.config_file import build_config
from job.config.model import BUILTIN_CELLS, ModelConfig
from job.config.schema import Config
from job.config.toml import ConfigValues, override_config, parse_sections
from job.console import Console
from job.data.content import check_content, content_name
from job.errors import UserError, error_origin, report_os_error
from job.export.export import check_export, export_model
from job.inference.evaluate import Evaluation, evaluate_text
from job.inference.generate import NO_CUSTOM_CELL, generate_texts
from job.inference.prefix import prefix_values, prefix_warnings
from job.paths import expand_path
from job.report.write import report_run, write_report
from job.run.driver import Launcher, run_training
from job.run.local_launcher import LocalLauncher
from job.run.metrics import read_rows
from job.run.plot import plot_perplexity
from job.run.process_state import process_state_restored
from job.run.run_dir import open_checkpoint, read_existing_run
from job.run.signals import StopRequest
from job.run.text_cache import TextCache
from job.storage import Folder
from job.training.checkpoint import LoadedCheckpoint

SHUTDOWN_TIMEOUT_S = 60.0  # for Ray Train to end, so that its cluster can be ended
CellClass = type[torch.nn.Module]


@dataclass(frozen=True, repr=False)
class Run:
    """A run: its results, and text that its last checkpoint generates.

    Args:
        folder: where it is stored
        config: its configuration, complete
        result: the content of ``result.json``; None if the run is not finished
        model_config: its cell as the caller gave it
    """

    folder: Folder
    config: Config
    result: dict[str, Any] | None
    model_config: ModelConfig = NO_CUSTOM_CELL

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, perplexity={self.perplexity})"

    @property
    def perplexity(self) -> float | None:
        """The training perplexity of the last epoch; None before the first one has ended."""
        if self.result:
            return float(self.result["perplexity"])
        return next((row["perplexity"] for row in reversed(self.metrics) if row["split"] == "epoch"), None)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``, read again each time."""
        with report_os_error(f"{self.folder}: cannot be read"):
            return list(read_rows(self.folder))

    def plot(self) -> Figure:
        """Returns the curve of the perplexity, which a notebook shows."""
        return plot_perplexity(self.metrics, self.folder.name)

    def generate(self, prefix: str | None = None, *, ensemble: "Sequence[Run]" = (), **fields: Any) -> Any:
        """Returns a prefix and its continuation by the model; a list of such texts if ``num_samples`` is above 1.

        Args:
            prefix: the text to continue; None: that of the configuration, or none after a saved state
            ensemble: other runs; the mean of all their probabilities and this run's is used
            fields: fields of the section generate, such as ``length``, ``temperature`` and ``seed``

        Raises:
            UserError: a field is invalid, the prefix is not known to the model, a file cannot be read or written, or
                the run has a custom cell that was not given
        """
        values = fields if prefix is None else {**fields, "prefix": prefix}
        named = prefix_values(parse_sections({"generate": values}))
        config = override_config(replace(self.config, model=self.model_config), named)
        with process_state_restored():
            generated = generate_texts([run._checkpoint for run in (self, *ensemble)], config)
        for warning in prefix_warnings(generated.prefix, config.corpus, self._checkpoint.vocabulary):
            warnings.warn(warning, stacklevel=2)
        return generated.texts if len(generated.texts) > 1 else generated.texts[0]

    def evaluate(
        self,
        corpus: "Mapping[str, Any] | str | os.PathLike[str] | None" = None,
        *,
        ensemble: "Sequence[Run]" = (),
        **fields: Any,
    ) -> Evaluation:
        """Returns the loss of a text under the model, as the verb evaluate computes it in this process.

        Args:
            corpus: its source, or fields of the section corpus; None: the text of the run
            ensemble: other runs, as in ``generate``
            fields: fields of the section evaluate, such as ``context``

        Raises:
            UserError: a field is invalid, the text cannot be read, or the run has a custom cell that was not given
        """
        values = parse_sections({"evaluate": fields} if corpus is None else {"evaluate": fields, "corpus": corpus})
        if "corpus.source" in values:
            values.setdefault("corpus.max_tokens", 0)
        config = override_config(replace(self.config, model=self.model_config), values)
        with process_state_restored():
            cache = TextCache(Console(sys.stderr), is_local=True)
            return evaluate_text([run._checkpoint for run in (self, *ensemble)], config, open_large=cache.open)

    def export(self, file_format: str, output: "str | os.PathLike[str]", weights: str = "auto") -> None:
        """Writes the model as a folder for other programs, as the verb export does.

        Args:
            file_format: onnx or hub
            output: a folder, new or empty
            weights: auto, raw or average, as ``evaluate.weights``

        Raises:
            UserError: the folder is not empty or cannot be written, a library is not installed, or onnx does not
                support the model
        """
        folder = check_export(file_format, _expand_path("output", output, "give a new folder"))
        config = override_config(replace(self.config, model=self.model_config), {"evaluate.weights": weights})
        with process_state_restored():
            export_model(self._checkpoint, config, file_format, folder)

    def report(self, *others: "Run | str | os.PathLike[str]", output: "str | os.PathLike[str] | None" = None) -> str:
        """Writes a page that shows this run next to others, as the verb report does, and returns its path.

        Args:
            others: runs, or the folders of runs and searches
            output: the file; None: ``report.html`` in the folder of this run

        Raises:
            UserError: a folder contains no run with metrics, the file cannot be written, or the plotting library is
                not installed
        """
        folders = (run.folder if isinstance(run, Run) else run for run in (self, *others))
        targets = [_expand_path("others", folder, "give a run or its folder") for folder in folders]
        file = None if output is None else _expand_path("output", output, "give a file, such as report.html")
        with process_state_restored():
            return write_report(targets, file, Console(sys.stderr))

    @cached_property
    def _checkpoint(self) -> LoadedCheckpoint:
        return open_checkpoint(self.folder)


def train(
    config: "str | os.PathLike[str] | Config | None" = None,
    *,
    text: str | None = None,
    tokens: Any = None,
    cell: CellClass | None = None,
    **sections: Any,
) -> Run:
    """Trains a run as ``python -m job train`` does, or resumes it, and returns it when it has finished.

    Args:
        config: a configuration file, or a configuration; None: the defaults
        text: the text to train on, in place of ``corpus.source``
        tokens: its token ids instead, a one-dimensional array of integers; needs ``vocabulary={"file": …}``
        cell: a class, in place of ``model.cell``; it may be defined in a notebook
        sections: fields that override those of the configuration, by section: ``model={"hidden_size": 64}``;
            ``corpus`` may be the source alone

    Raises:
        UserError: the input is invalid; nothing was started
        RunFailed: the run failed; the error says what was saved
        KeyboardInterrupt: Ctrl-C; the run was saved and can be resumed
        SystemExit: SIGTERM, with status 143; the run was saved and can be resumed
    """
    values, content = parse_sections(sections, "text", "tokens", "cell"), check_content(text, tokens)
    if content is not None:
        _set(values, "corpus.source", content_name(content), "text" if tokens is None else "tokens")
    if cell is not None:
        _set(values, "model.cell", _cell_name(cell), "cell")
    if isinstance(config, Config):
        resolved, default_name = override_config(config, values), "run"
    else:
        path = None if config is None else _expand_path("config", config, "give a configuration file or a Config")
        resolved, default_name = build_config(path, values, "job.train")[0], Path(path or "run").stem
    if tokens is not None and not resolved.vocabulary.file and resolved.vocabulary.kind != "byte":
        raise UserError(
            "tokens: their vocabulary is missing", 'add vocabulary={"file": …}, a vocabulary.json or tokenizer.json'
        )
    if "model.cell" in values:
        cell_class = None if cell is None or _is_importable(cell) else cell
        resolved = replace(resolved, model=replace(resolved.model, cell_class=cell_class))
    stop_request = StopRequest()
    with process_state_restored():
        launcher = select_launcher(resolved, SHUTDOWN_TIMEOUT_S)
        outcome = run_training(
            resolved, default_name, Console(), launcher, stop_request, content=content, in_python=True
        )
        report_run(outcome, Console())
    if stop_request.exit_code or outcome.result is None:
        raise KeyboardInterrupt if stop_request.exit_code in (0, 128 + SIGINT) else SystemExit(stop_request.exit_code)
    return Run(outcome.folder, outcome.config, outcome.result, outcome.config.model)


def load(folder: "str | os.PathLike[str]", cell: CellClass | None = None) -> Run:
    """Opens the run in a folder, finished or not, or one of its checkpoints.

    Args:
        folder: a path or URI, or the ``folder`` of a Run
        cell: the class of a custom cell, whose code a run's folder does not contain; needed to generate text

    Raises:
        UserError: the folder contains no run, or its cell is built in and one was given
    """
    remedy = "give a run's folder, such as runs/seed-1 or run.folder"
    path = Folder.resolve(_expand_path("folder", folder, remedy))
    existing = read_existing_run(path)
    if existing is None:
        raise UserError(f"{path}: is not a run", remedy)
    model = existing.config.model
    if cell is not None and model.cell in BUILTIN_CELLS:
        raise UserError(f"cell = {_cell_name(cell)}: the cell of this run is {model.cell}", "leave it out")
    given = NO_CUSTOM_CELL if cell is None else replace(model, cell_class=cell)
    return Run(path, existing.config, existing.result, given)


def select_launcher(config: Config, shutdown_timeout_s: float | None = None) -> Launcher:
    """Returns the launcher that ``scale.workers`` needs. Imports Ray only for workers on a cluster.

    Args:
        config: the run's configuration
        shutdown_timeout_s: how long to wait for Ray Train to end; None: shortly, because this process ends, too
    """
    if not config.scale.max_workers:
        return LocalLauncher()
    from job.cluster.launcher import RayLauncher

    return RayLauncher(shutdown_timeout_s=shutdown_timeout_s)


def _expand_path(argument: str, path: "str | os.PathLike[str]", remedy: str) -> str:
    """Returns a path with ``$NAME`` and ``~`` expanded. Raises UserError if the argument is no valid path."""
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"{argument}: must be a path and not {type(path).__name__}", remedy)
    with error_origin(argument):
        return expand_path(os.fspath(path))


def _set(values: ConfigValues, name: str, value: str, argument: str) -> None:
    """Sets a field to what an argument gives. Raises UserError if the field is set already."""
    if name in values:
        raise UserError(f"{argument}: {name} is given, too", "give one of them")
    values[name] = value


def _cell_name(cell: CellClass) -> str:
    if not isinstance(cell, type):
        raise UserError(f"cell: must be a class and not {type(cell).__name__}", "see 'Custom cells' in the README")
    return f"{cell.__module__}:{cell.__name__}"


def _is_importable(cell: CellClass) -> bool:
    """Whether workers can import the class by its name, so that its code need not be sent to them."""
    return cell.__module__ != "__main__" and getattr(sys.modules.get(cell.__module__), cell.__name__, None) is cell
