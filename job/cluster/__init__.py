"""Runs and searches on Ray. The only package that imports it.

Sets environment variables before that import, unless the user has set them.
"""

import os
import subprocess
import sys

from job.errors import UserError

# Read by Ray in the driver and the workers.
RAY_ENV_DEFAULTS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread of Ray Data that outlives the connection would connect again
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a dead worker is noticed within this time
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_LOG_TO_DRIVER_EVENT_LEVEL": "ERROR",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "Raylet is terminated",  # a dead node would print pages of its log
    "RAY_worker_niceness": "0",  # otherwise Ray's own processes have priority over training
}
# Also set for Ray's processes on the nodes of a cluster.
NODE_ENV_DEFAULTS = {
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",  # for workers that hang
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a worker whose collective times out ends, as with Ray's own set-up
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS is reproducible only with this
    "OMP_WAIT_POLICY": "PASSIVE",  # as in job/__init__.py
}
# Read by Ray Tune.
TUNE_ENV_DEFAULTS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a trial's paths are relative to the command's folder
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails at once has no metric
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # Ray Tune's own records are not used
}


def _check_ray_settings() -> None:
    """Raises UserError if one of the user's settings of Ray's core, ``RAY_name``, would crash this process."""
    changed = dict(os.environ.items() - RAY_ENV_DEFAULTS.items())
    settings = {name: value for name, value in changed.items() if name.startswith("RAY_") and name[4:5].islower()}
    if not settings or "ray" in sys.modules:
        return
    imported = subprocess.run([sys.executable, "-c", "import ray"], capture_output=True, check=False)
    if imported.returncode:
        values = ", ".join(f"{name} = {value}" for name, value in settings.items())
        raise UserError(f"{values}: Ray cannot be imported with such a value", "correct or unset it")


def set_environment_defaults() -> None:
    """Sets the variables that the user has not set. Called before Ray is imported, and before each run."""
    for name, value in (RAY_ENV_DEFAULTS | NODE_ENV_DEFAULTS | TUNE_ENV_DEFAULTS).items():
        os.environ.setdefault(name, value)


_check_ray_settings()
set_environment_defaults()
