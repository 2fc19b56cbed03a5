"""What a report shows of a run, as a value of JSON: its figures, configuration, curves, samples and losses."""

from dataclasses import dataclass, field
from typing import Any

from job.config.field import format_value
from job.config.model import ModelConfig
from job.config.schema import FIELDS, Config
from job.data.dataset import Dataset
from job.errors import UserError, report_os_error
from job.inference.generate import NO_CUSTOM_CELL
from job.paths import mask_credentials
from job.report.curves import read_curves
from job.report.text_losses import read_text_losses
from job.run.metrics import read_last_rows
from job.run.run_dir import ExistingRun, open_checkpoint
from job.run.samples import read_samples
from job.run.text_cache import TextCache
from job.storage import Folder

SAMPLE_FILE = "sample.txt"
MAX_SAMPLES = 24  # of each kind: the first, the last, and some in between
MAX_SAMPLE_CHARACTERS = 2000
_MAX_SAMPLE_BYTES = 64 << 20
_SAMPLE_FIELDS = ("step", "epoch", "kind", "prefix", "continuation")
_HIDDEN_FIELDS = ("run.name", "run.storage", "run.resume")  # shown otherwise, or without an effect on the run
_VALIDATION_FIGURES = ("validation_perplexity", "best_validation_perplexity", "validation_bits_per_character")
_RESULT_FIGURES = ("epochs", "steps", "tokens", "seconds", "perplexity", *_VALIDATION_FIGURES, "workers", "restarts")


class NothingToShow(UserError):
    """A run or a search has no metrics yet."""


@dataclass(frozen=True)
class ReportedRun:
    """A run of a report, and what the caller has of it already.

    Args:
        folder: the run's folder
        name: as the report shows it
        run: its configuration and result
        has_text: whether to compute the losses of the validation text
        dataset: what it was trained on; None: read it again if it is needed
        model_config: its cell as the user gave it
        more: further figures, by name
    """

    folder: Folder
    name: str
    run: ExistingRun
    has_text: bool = True
    dataset: Dataset | None = None
    model_config: ModelConfig = NO_CUSTOM_CELL
    more: dict[str, Any] = field(default_factory=dict)

    def describe(self, cache: TextCache) -> dict[str, Any]:
        """Returns the run as a value of JSON.

        Args:
            cache: opens large texts

        Raises:
            NothingToShow: the run has no metrics
            UserError: its files cannot be read
        """
        with report_os_error(f"{self.folder}: cannot be read"):
            curves, figures = read_curves(self.folder), self._figures()
            samples = _read_samples(self.folder, figures["steps"])
        if not curves["curves"]:
            raise NothingToShow(f"{self.folder}: has no metrics yet", "wait for the run's first report")
        return {
            "name": self.name,
            "folder": mask_credentials(str(self.folder)),
            "state": "finished" if self.run.result else "unfinished",
            "figures": {**figures, **self.more},
            "config": _config_texts(self.run.config),
            **curves,
            "samples": samples,
            "text": self._text_losses(cache),
        }

    def _figures(self) -> dict[str, Any]:
        """Returns the numbers of the result; of a run without one, those of its last rows."""
        if self.run.result:
            return {name: self.run.result.get(name) for name in _RESULT_FIGURES}
        rows = read_last_rows(self.folder)
        last = max(rows.values(), key=lambda row: row["step"], default={"step": 0})
        epoch = rows.get("epoch") or rows.get("train") or {}
        return {
            "epochs": rows.get("epoch", {}).get("epoch", 0),
            "steps": last["step"],
            "tokens": last.get("tokens"),
            "perplexity": epoch.get("perplexity"),
            "validation_perplexity": rows.get("validation", {}).get("perplexity"),
            "workers": last.get("workers"),
        }

    def _text_losses(self, cache: TextCache) -> dict[str, Any] | None:
        """Returns the losses of the beginning of the validation text, or the reason that there are none."""
        if not self.has_text:
            return None
        best = (self.run.result or {}).get("best_checkpoint")
        try:
            with report_os_error(f"{self.folder}: cannot be read"):
                loaded = open_checkpoint(self.folder / best if best and self.folder.has(best) else self.folder)
                tokens = read_text_losses(loaded, self.run.config, self.dataset, self.model_config, cache)
        except UserError as error:
            return {"reason": mask_credentials(str(error))}
        return {"checkpoint": loaded.checkpoint.name, "step": loaded.checkpoint.step, "tokens": tokens}


def _config_texts(config: Config) -> dict[str, dict[str, Any]]:
    """Returns the values of all fields as text, and whether each is the default."""
    values = {name: value for name, value in config.values().items() if name not in _HIDDEN_FIELDS}
    return {
        name: {"text": mask_credentials(format_value(value)), "default": value == FIELDS[name].default}
        for name, value in values.items()
    }


def _read_samples(folder: Folder, step: int) -> list[dict[str, Any]]:
    """Returns samples at several moments of training; of a run without any, that of its end at ``step``."""
    samples = list(read_samples(folder))
    if not samples and folder.has(SAMPLE_FILE):
        text = folder.read(SAMPLE_FILE, _MAX_SAMPLE_BYTES).decode(errors="replace")
        samples = [{"step": step, "epoch": None, "kind": "greedy", "prefix": "", "continuation": text}]
    chosen = []
    for kind in dict.fromkeys(sample["kind"] for sample in samples):
        of_kind = [sample for sample in samples if sample["kind"] == kind]
        count = min(MAX_SAMPLES, len(of_kind))
        chosen += [of_kind[index * (len(of_kind) - 1) // max(count - 1, 1)] for index in range(count)]
    return [{name: _shorten(sample[name]) for name in _SAMPLE_FIELDS} for sample in chosen]


def _shorten(value: Any) -> Any:
    return value[:MAX_SAMPLE_CHARACTERS] if isinstance(value, str) else value
