"""Checkpoints that pass from one trial to another in population-based training."""

from job.config.config_file import CONFIG_FILE
from job.config.schema import Config
from job.config.toml import config_to_toml
from job.errors import RunFailed
from job.run.run_dir import read_existing_run
from job.storage import Folder
from job.training.checkpoint import Checkpoint, copy_checkpoint, list_checkpoints, remove_checkpoint

EXCHANGE_FOLDER = "exchange"  # in a search's folder: exported checkpoints, removed when the search ends
EXCHANGED_FILE = "exchanged"  # in a run's folder: the checkpoint it last exported or imported


def export_checkpoint(checkpoint: Checkpoint, run_folder: Folder, target: Folder) -> None:
    """Copies a checkpoint of the run in ``run_folder`` to ``target``, from which other trials import it."""
    copy_checkpoint(checkpoint, target)
    run_folder.write(EXCHANGED_FILE, checkpoint.name.encode())


def import_checkpoint(source: Folder, run_folder: Folder, config: Config) -> None:
    """Makes the run in ``run_folder`` resume from the last checkpoint in ``source``, with ``config``.

    Crash-safe: at every moment the run resumes either from its own last checkpoint or from this one.
    Ray Tune may pass the checkpoint that this run last exported or imported again after the trial's
    process died. The run has continued since then, so nothing is copied, unless ``forget_exchange`` was called.
    """
    exported, _ = list_checkpoints(source)
    if not exported:
        raise RunFailed(f"{source}: the checkpoint that another trial exported is missing")
    checkpoint = exported[-1]
    run = read_existing_run(run_folder)
    last_exchanged = run_folder.read(EXCHANGED_FILE, 100) if run_folder.has(EXCHANGED_FILE) else b""
    if run and run.config == config and last_exchanged == checkpoint.name.encode():
        return
    checkpoints = run_folder / "checkpoints"
    copy_checkpoint(checkpoint, checkpoints)
    for other in checkpoints.names():
        if other.startswith("step-") and other != checkpoint.name:
            remove_checkpoint(checkpoints, other)
    run_folder.write(CONFIG_FILE, config_to_toml(config).encode())
    run_folder.write(EXCHANGED_FILE, checkpoint.name.encode())


def forget_exchange(run_folder: Folder) -> None:
    """Makes the next ``import_checkpoint`` copy its checkpoint even if the run exchanged it last."""
    run_folder.remove(EXCHANGED_FILE)
