"""A search on Ray Tune: trials run at the same time, each an ordinary run.

Ray Tune starts the trials, and its schedulers pause and stop them. The state of a trial is read from its
run's folder: a resumed search is a new experiment with the trials that are not done. Ray Tune's own records contain
pickled objects, some of which it reads back, so they are in a private folder of the driver until the search ends.
"""

import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial

from ray import tune
from ray.tune.experiment import Trial as RayTrial

from job.cluster.connection import BackgroundTask, connect, is_local
from job.cluster.launcher import check_placement, create_event_channel
from job.cluster.local_cluster import check_processes, disconnect
from job.cluster.ray_extensions import HEAD_NODE_RESOURCE
from job.cluster.resources import Placement
from job.cluster.schedulers import OptunaSearcher, build_scheduler
from job.cluster.train_worker import one_line
from job.cluster.trainable import TrialContext, TrialTrainable
from job.cluster.tune_callbacks import TrialCallback
from job.cluster.waiting import WaitingNotice
from job.config.schema import Config
from job.config.search_space import SearchConfig
from job.config.toml import config_to_toml
from job.console import Console
from job.errors import RunFailed, UserError
from job.paths import cache_notice
from job.report.write import report_search
from job.run.lease import Lease, acquire_lease, wait_until_expired
from job.run.run_dir import SEARCH_FILE
from job.run.signals import StopRequest
from job.run.text_cache import TextCache
from job.tuning.exchange import EXCHANGE_FOLDER
from job.tuning.optuna_sampler import OptunaSampler, import_optuna
from job.tuning.report import banner, show_progress
from job.tuning.results import has_results, print_results, write_results
from job.tuning.setup import check_search, resolve_search
from job.tuning.trials import BEST_FILE, TERMINAL_STATES, Trials, load_trials, searched_cells, trial_name

MAX_TRIAL_FAILURES = 5  # restarts of a trial without a new epoch in between
POLL_INTERVAL_S = 0.2
RESUME = "the same command resumes the search"
NUM_EXCHANGE_CHECKPOINTS = 5  # checkpoints of a trial that others may copy in population-based training


def run_search(config: Config, search: SearchConfig, default_name: str, console: Console) -> int:
    """Runs or resumes a search, writes its results and prints them.

    Returns:
        the exit status

    Raises:
        UserError: before a trial starts, if the search or one of its trials is invalid
        RunFailed: no trial produced a result, or Ray Tune failed
    """
    folder, config = resolve_search(config, search, default_name)
    trials = load_trials(folder, config, search)
    if not trials.num_pending and has_results(trials):
        console.print(f"{folder} is finished; raise search.trials to search longer")
        print_results(trials, console)
        return 0
    folder = replace(folder, retry=True)
    observer = wait_until_expired(folder, console.print)
    cache = TextCache(console, is_local(config.scale))
    base = check_search(config, search, folder, console, cache)  # the first Ctrl-C ends it: nothing has been started
    folder.check_writable()
    stop_request = StopRequest()
    with stop_request.installed():
        if notice := cache_notice():
            console.warn(notice)
        if stop_request.exit_code:
            return stop_request.exit_code
        if search.searcher == "optuna":
            import_optuna()  # fails before a cluster is started
        with _connected(base, search, console) as (scaled, placement), acquire_lease(folder, observer) as lease:
            try:
                lease.folder.write(SEARCH_FILE, config_to_toml(base, search).encode())
                for name in (BEST_FILE, EXCHANGE_FOLDER):  # of a driver that died
                    lease.folder.remove(name)
                trials = load_trials(lease.folder, *scaled)
                if trials.num_pending:
                    _run_trials(trials, placement, lease, stop_request, console)
                exit_code = stop_request.exit_code  # a later interrupt finds nothing to stop
                if exit_code:
                    console.print(f"stopped; the same command resumes {folder}")
                else:
                    trials = load_trials(lease.folder, base, search)  # as the files state
                    write_results(trials)
                    print_results(trials, console)
                report_search(trials, console)
                return exit_code
            except OSError as error:
                raise RunFailed(f"{folder}: cannot be read or written: {error.strerror or error}", RESUME) from None
            except UserError as error:
                raise RunFailed(error.problem, error.remedy or RESUME) from None


@contextmanager
def _connected(
    base: Config, search: SearchConfig, console: Console
) -> Iterator[tuple[tuple[Config, SearchConfig], Placement]]:
    """Connects to the cluster.

    Yields the configuration and the search with what the cluster can hold as ``scale`` and ``search.concurrent``, and
    the placement of a trial's workers.
    """
    scale = replace(base.scale, cpus_per_worker=base.scale.cpus_per_worker or 1)
    # Without workers the trial's actor trains, so it needs the resources of one worker.
    worker_scale = scale if scale.max_workers else replace(scale, workers=1)
    with ExitStack() as stack:
        placement, max_concurrent = connect(worker_scale, stack, min(search.concurrent, search.num_trials))
        stack.callback(disconnect)
        if placement.workers_per_gpu > 1:
            problem = f"scale.workers = {scale.workers}: the workers of a trial do not share a GPU"
            raise UserError(problem, "lower it, or leave out the setting that requires GPUs")
        check_placement(placement, console, base.run.storage, *searched_cells(base, search))
        if scale.max_workers:
            if placement.max_workers < scale.max_workers:
                scale = replace(scale, workers=placement.max_workers)
            # All trials use the same accelerator, whichever nodes an autoscaler adds later.
            scale = replace(scale, accelerator="gpu" if placement.use_gpu else "cpu")
        yield (replace(base, scale=scale), replace(search, concurrent=max_concurrent)), placement


def _run_trials(
    trials: Trials, placement: Placement, lease: Lease, stop_request: StopRequest, console: Console
) -> None:
    """Runs Ray Tune and shows progress until all trials are done, time is up or a stop is requested."""
    console.print(banner(trials))
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the callback reports what matters
    callback = TrialCallback(trials, MAX_TRIAL_FAILURES)
    event_channel = create_event_channel()
    context = TrialContext(
        trials.base, trials.search, trials.folder, os.getcwd(), event_channel, is_local(trials.base.scale)
    )
    waiting = WaitingNotice(placement, console)
    deadline = time.monotonic() + (60 * trials.search.minutes or math.inf)
    with (
        tempfile.TemporaryDirectory(prefix="lanes-", ignore_cleanup_errors=True) as records,
        open(os.devnull, "w") as null,
        redirect_stdout(null),  # Ray Tune prints even with verbose=0
    ):
        # In a thread, so that the main thread can handle signals.
        thread = BackgroundTask(partial(_run_tune, placement, callback, context, records))
        thread.start()
        while thread.is_alive():
            thread.join(POLL_INTERVAL_S)
            check_processes(RESUME)
            if not callback.stop_requested and (stop_request.exit_code or time.monotonic() > deadline):
                callback.stop_requested = True
                event_channel.request.remote(stop=True)
            lease.check_if_stale()
            callback.record_ended(console)
            show_progress(trials, console)
            waiting.poll(has_workers=time.monotonic() - callback.last_result_at < 2 * POLL_INTERVAL_S)
        callback.record_ended(console)
    trials.folder.remove(EXCHANGE_FOLDER)
    if thread.error:
        raise RunFailed(f"Ray Tune failed: {one_line(thread.error)}", RESUME)
    if callback.stop_requested and not stop_request.exit_code:
        num_left = trials.search.num_trials - sum(trial.state in TERMINAL_STATES for trial in trials)
        console.print(f"time is up with {num_left} trials left; the same command resumes {trials.folder}")


def _run_tune(placement: Placement, callback: TrialCallback, context: TrialContext, records: str) -> None:
    """Runs the experiment with the trials that are not done. Ray Tune writes its records to a private folder."""
    trials, search = callback.trials, context.search
    per_trial = placement.resources
    if context.base.scale.max_workers:
        # The workers reserve their own resources. The actor takes a share of the head node, so that no more trials
        # start than have resources for all their workers.
        per_trial = {HEAD_NODE_RESOURCE: max(1, 9000 // search.concurrent) / 10_000}
    searcher, num_samples, param_space = None, 1, {}
    if search.searcher == "optuna":
        searcher = OptunaSearcher(trials, OptunaSampler(search.space, trials.base.run.seed))
        num_samples = len(searcher.pending)
    else:
        pending = [{"number": trial.number, "params": trial.params} for trial in trials if not trial.is_done]
        param_space = {"trial": tune.grid_search(pending)}
    trainable = tune.with_parameters(TrialTrainable, context=context)
    tuner = tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([per_trial])),
        param_space=param_space,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=num_samples,
            scheduler=build_scheduler(callback),
            # Population-based training needs all trials; it pauses those that the resources cannot hold.
            max_concurrent_trials=None if search.scheduler == "pbt" else search.concurrent,
            reuse_actors=True,
            trial_name_creator=_ray_trial_name,
            trial_dirname_creator=_ray_trial_name,
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=records,
            failure_config=tune.FailureConfig(max_failures=MAX_TRIAL_FAILURES),
            # Only for the exchange between trials: the runs keep their own checkpoints.
            checkpoint_config=tune.CheckpointConfig(num_to_keep=NUM_EXCHANGE_CHECKPOINTS, checkpoint_at_end=False),
            callbacks=[callback],
            stop=callback,
            verbose=0,
        ),
    )
    tuner.fit()


def _ray_trial_name(trial: RayTrial) -> str:
    return trial_name(trial.config["trial"]["number"])
