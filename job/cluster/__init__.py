"""Runs and searches on Ray. The only package that imports it.

The environment variables are set here because Ray reads them when it is imported.
"""

import os

# Ray reads these when it is imported. What a user has set stays.
RAY_ENV_DEFAULTS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # seconds until a dead worker is seen
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_LOG_TO_DRIVER_EVENT_LEVEL": "ERROR",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "Raylet is terminated",  # with pages of its log, where a node died
    "RAY_worker_niceness": "0",  # else Ray's own housekeeping goes before training
}
# These concern Ray's processes on the nodes.
NODE_ENV_DEFAULTS = {
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",  # seconds to wait for a worker that hangs
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what cuBLAS needs to be reproducible
    "OMP_WAIT_POLICY": "PASSIVE",  # as in __init__
}
# Ray Tune reads these when it starts.
TUNE_ENV_DEFAULTS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a trial's paths are those of the command
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails at once has no metric
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # its own records are not used
}
for _name, _value in (RAY_ENV_DEFAULTS | NODE_ENV_DEFAULTS | TUNE_ENV_DEFAULTS).items():
    os.environ.setdefault(_name, _value)
