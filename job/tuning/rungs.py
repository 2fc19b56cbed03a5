"""When a scheduler may act on a trial, and whether it ever can."""

import math

from job.config.schema import Config
from job.config.search_space import SearchConfig
from job.config.toml import override_config
from job.data.dataset import Dataset
from job.data.stream import Stream
from job.errors import UserError

# ASHA stops no trial in the first 1/4 of its epochs, since fast learners may start badly. Population-based training
# compares trials 8 times during a run.
_EPOCH_DIVISORS = {"asha": 4, "pbt": 8}


def max_epochs(base: Config, search: SearchConfig) -> int:
    """Returns the largest ``train.epochs`` of a trial."""
    domain = search.space.domains.get("train.epochs")
    return max(domain.values) if domain else base.train.epochs


def first_rung(scheduler: str, epochs: int) -> int:
    """Returns the first epoch after which ASHA may stop a trial, or population-based training replace it.

    Args:
        scheduler: asha or pbt
        epochs: the largest ``train.epochs`` of a trial
    """
    return max(1, epochs // _EPOCH_DIVISORS[scheduler])


def check_scheduler(base: Config, search: SearchConfig, dataset: Dataset) -> None:
    """Raises UserError if the scheduler can act on no trial: if all end before, or there is only one."""
    if search.scheduler == "none":
        return
    origin = f'search.scheduler = "{search.scheduler}": has no effect'
    if search.num_trials < 2:
        raise UserError(f"{origin}, as there is only one trial", 'add trials, or set scheduler = "none"')
    epochs = max_epochs(base, search)
    rung, last_epoch = first_rung(search.scheduler, epochs), min(epochs, _max_epochs_of_steps(base, search, dataset))
    if rung >= last_epoch:  # in its last epoch a trial ends by itself
        cause = f"train.epochs = {epochs}" if last_epoch == epochs else f"train.max_steps = {base.train.max_steps}"
        raise UserError(
            f"{origin}, as it first compares trials after epoch {rung} and {cause} ends them in epoch {last_epoch}",
            'let them be longer, or set scheduler = "none"',
        )


def _max_epochs_of_steps(base: Config, search: SearchConfig, dataset: Dataset) -> float:
    """Returns the most epochs that a trial begins within ``train.max_steps``."""
    domains = search.space.domains
    if not base.train.max_steps or any(name.startswith(("corpus.", "vocabulary.")) for name in domains):
        return math.inf
    sizes = ("stream.batch_size", "stream.num_steps")  # with the largest an epoch has the fewest windows
    largest = {name: max(domains[name].values) for name in sizes if name in domains}
    stream = Stream(dataset.train_tokens, override_config(base, largest).stream, base.run.seed)
    return math.ceil(base.train.max_steps / max(1, stream.partition(0).num_windows))
