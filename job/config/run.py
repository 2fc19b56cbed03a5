"""The sections of a run: its name and storage, its workers, its trackers."""

from dataclasses import dataclass

from job.config.field import FREE, choice_field, config_field
from job.config.section import Section
from job.errors import UserError
from job.paths import check_no_credentials

_NAME = "|[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass(frozen=True)
class RunConfig(Section, on_resume=FREE):
    """The run's name and storage."""

    name: str = config_field(
        "", "folder of the run; empty: the configuration's name and a number", pattern=_NAME,
        form="letters, digits, '.', '_' and '-', with a letter or digit first",
    )  # fmt: skip
    storage: str = config_field("runs", "where runs are stored: a folder or a URI; $NAME is expanded", is_path=True)
    seed: int = config_field(0, "random seed", ge=0, lt=2**63, on_resume="fixed")
    resume: str = choice_field("resume the run", auto="if it exists", never="", must="")
    resume_from: str = config_field(
        "", "start from a checkpoint of another run: its folder, or the run's; empty: none", is_path=True,
        on_resume="may be left out",
    )  # fmt: skip


@dataclass(frozen=True)
class ScaleConfig(Section, on_resume=FREE):
    """The workers and their hardware."""

    workers: str | int = config_field(
        2, "number of workers (0: in this process)", ge=0, pattern="0{0,9}[1-9][0-9]{0,8}-[0-9]{1,18}",
        form='an integer, or a range such as "2-8" (elastic)',
    )  # fmt: skip
    accelerator: str = choice_field("hardware of the workers", auto="a GPU if there is one for each", cpu="", gpu="")
    accelerator_type: str = config_field(
        "", "GPU that workers need", pattern=_NAME, form="a name that Ray gives it, such as A100, H100 or T4"
    )
    cpus_per_worker: int = config_field(0, "cores per worker; 0: share of this machine, 1 on a cluster", "cores", ge=0)
    placement: str = choice_field("nodes on which workers are placed", pack="few", spread="many")
    hang_timeout: float = config_field(
        60.0, "until a hung worker is replaced, and between elastic resizes", "seconds", ge=1e-3, le=10**9
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_workers > self.max_workers:
            raise UserError(f'scale.workers = "{self.workers}": must be an integer, or a range such as "2-8"')

    @property
    def min_workers(self) -> int:
        """The fewest workers that the run continues with."""
        return int(str(self.workers).split("-")[0])

    @property
    def max_workers(self) -> int:
        """The most workers that the run uses."""
        return int(str(self.workers).split("-")[-1])

    @property
    def gpu_requirement(self) -> str:
        """The field that requires GPUs and its value, for messages; empty if none does."""
        if self.accelerator_type:
            return f"scale.accelerator_type = {self.accelerator_type}"
        return "scale.accelerator = gpu" if self.accelerator == "gpu" else ""


@dataclass(frozen=True)
class TrackingConfig(Section, on_resume=FREE):
    """Trackers that follow a run, but not the trials of a search."""

    mlflow: str = config_field("", "URI of MLflow's server or store; env: MLFLOW_TRACKING_URI; empty: none")
    wandb: str = config_field("", "project of Weights & Biases; empty: none")
    checkpoint: bool = config_field(True, "upload the last checkpoint of a finished run")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_credentials("tracking.mlflow", self.mlflow)

    @property
    def targets(self) -> dict[str, str]:
        """The URI or the project of each tracker, by its name."""
        return {name: target for name, target in (("mlflow", self.mlflow), ("wandb", self.wandb)) if target}
