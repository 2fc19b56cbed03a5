"""What job/cluster/ray_extensions.py uses of Ray's private API: an upgrade of Ray fails the cases that changed."""

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from functools import reduce
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions
from conftest import ROOT, disconnect_from_ray

import job.cluster as job_cluster
from job.cluster import ray_extensions

TRAIN = "ray.train.v2._internal"
TRAINER = "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer"
POLICY = f"{TRAIN}.execution.scaling_policy"
STATE = f"{TRAIN}.execution.controller.state"
# Parameters of functions and methods, and of the constructors of classes; None where only the name is used.
SIGNATURES = {
    # The trainer and its controller
    f"{TRAINER}._initialize_and_run_controller": "self **controller_init_kwargs",
    f"{TRAINER}._create_default_callbacks": "self",
    f"{TRAIN}.callbacks.datasets:DatasetsCallback": None,
    f"{TRAIN}.execution.callback:ControllerCallback.after_controller_state_update": "self previous_state current_state",
    f"{STATE}:ReschedulingState": "training_failed_error",
    f"{STATE}:RestartingState": "training_failed_error",
    f"{STATE}:ResizingState": "scaling_decision",
    "ray.train:WorkerGroupError": "error_message worker_failures",
    "ray.train:ControllerError": "controller_failure",
    f"{TRAIN}.exceptions:WorkerGroupStartupFailedError": None,
    f"{TRAIN}.exceptions:WorkerGroupStartupTimeoutError": "num_workers",
    f"{TRAIN}.exceptions:WorkerHealthCheckFailedError": "message failure",
    # The scaling policy
    f"{POLICY}:ElasticScalingPolicy": "scaling_config",
    f"{POLICY}:ElasticScalingPolicy.make_decision_for_non_running_worker_group": "self",
    f"{POLICY}:ElasticScalingPolicy.make_decision_for_running_worker_group": (
        "self worker_group_state worker_group_status"
    ),
    f"{POLICY}:ElasticScalingPolicy._count_possible_workers": "self reserved_resources",
    f"{POLICY}:ResizeDecision": None,
    f"{POLICY}:ScalingDecision": None,
    f"{POLICY}.autoscaling_coordinator_client:TrainAutoscalingCoordinatorClient": "requester_id",
    f"{POLICY}.autoscaling_coordinator_client:TrainAutoscalingCoordinatorClient.cancel_resource_request": "self",
    # A run's own cluster
    "ray._private.services:resolve_ip_for_localhost": "host",
    "ray._private.worker:_global_node": None,
    "ray._private.node:Node.dead_processes": "self",
    "ray._private.node:Node.webui_url": None,
    "ray._private.ray_constants:PROCESS_TYPE_GCS_SERVER": None,
    "ray._private.ray_constants:PROCESS_TYPE_RAYLET": None,
    "ray._raylet:AuthenticationTokenLoader.instance": None,
    "ray._raylet:AuthenticationTokenLoader.reset_cache": None,
    "ray._raylet:Config.initialize": None,
    # torch.distributed
    "ray.train.torch:TorchConfig.backend_cls": None,
    "ray.train.torch.config:_TorchBackend.on_start": "self worker_group backend_config",
    f"{TRAIN}.execution.worker_group:WorkerGroup.execute": "self fn *fn_args **fn_kwargs",
    f"{TRAIN}.execution.worker_group:WorkerGroup.execute_single": "self rank fn *fn_args **fn_kwargs",
    f"{TRAIN}.execution.worker_group:WorkerGroup.abort": "self",
    # Ray Tune
    "ray.train._internal.session:_TrainingResult": "checkpoint metrics",
    "ray.tune:Trainable.save": "self checkpoint_dir",
    "ray.tune:Trainable.restore": "self checkpoint_path",
    # The cluster's resources
    "ray._private.state:available_resources_per_node": "",
    "ray._private.ray_constants:DEBUG_AUTOSCALING_STATUS": None,
    "ray._common.constants:HEAD_NODE_RESOURCE_NAME": None,
    "ray.autoscaler._private.util:format_readonly_node_type": "node_id",
    "ray.autoscaler.v2.utils:is_autoscaler_v2": "fetch_from_server gcs_client",
    "ray.experimental.internal_kv:_internal_kv_get": "key namespace",
}
# Environment variables that job.cluster sets, and where Ray defines them.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": f"{TRAIN}.constants:HEALTH_CHECK_INTERVAL_S_ENV_VAR",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": f"{TRAIN}.constants:ENABLE_PRINT_PATCH_ENV_VAR",
    "RAY_TRAIN_METRICS_ENABLED": f"{TRAIN}.constants:METRICS_ENABLED_ENV_VAR",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{TRAIN}.constants:WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{TRAIN}.constants:WORKER_GROUP_START_TIMEOUT_S_ENV_VAR",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "ray.train.constants:TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S",
    "RAY_CHDIR_TO_TRIAL_DIR": "ray.train.constants:RAY_CHDIR_TO_TRIAL_DIR",
    "RAY_USAGE_STATS_ENABLED": "ray._common.usage.usage_constants:USAGE_STATS_ENABLED_ENV_VAR",
    "RAY_AUTH_MODE": "ray._private.authentication.authentication_token_setup:AUTH_MODE_ENV_VAR",
}
# Attributes and names that Ray keeps to itself although their spelling does not show it.
INTERNAL_ATTRIBUTES = {
    "train_run_context",
    "_trial_state",
    "run_metadata",
    "webui_url",
    "_count_possible_workers",
    "_initialize_and_run_controller",
}
INTERNAL_STRINGS = ("ray._", "_internal", "__autoscaling_status", "AutoscalingCoordinator", "WorkerGroupStartup")
INTERNAL_MODULES = ("ray.autoscaler", "ray.experimental", "ray.data", "ray.dashboard")


def resolve(name: str) -> Any:
    module, _, path = name.partition(":")
    return reduce(getattr, path.split("."), importlib.import_module(module))


def short(name: str) -> str:
    return name.partition(":")[2]


def parameters(thing: Callable[..., Any]) -> str:
    """The names of a callable's parameters, with stars."""
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return " ".join(stars.get(part.kind, "") + part.name for part in inspect.signature(thing).parameters.values())


@pytest.mark.parametrize(("name", "expected"), SIGNATURES.items(), ids=map(short, SIGNATURES))
def test_ray_private_name_exists_with_expected_signature(name: str, expected: str) -> None:
    thing = resolve(name)
    assert expected is None or parameters(thing) == expected


@pytest.mark.parametrize(("variable", "name"), ENVIRONMENT.items(), ids=ENVIRONMENT)
def test_ray_environment_variable_has_expected_name(variable: str, name: str) -> None:
    assert resolve(name) == variable


def test_ray_without_connection_raises_instead_of_connecting_by_itself() -> None:
    """Threads of Ray Data fetch results in advance, and may do so when a command has disconnected."""
    with pytest.raises(ray.exceptions.RaySystemError):
        ray.put(1)
    assert not ray.is_initialized()


def test_connection_that_a_test_leaves_fails_it(monkeypatch: pytest.MonkeyPatch) -> None:
    disconnect_from_ray()
    with monkeypatch.context() as patch:
        patch.setattr("ray.is_initialized", lambda: True)
        with pytest.raises(AssertionError, match="left this process connected to Ray"):
            disconnect_from_ray()


def test_ray_environment_defaults_of_train_are_all_checked() -> None:
    checked = ("RAY_TRAIN_", "TORCH_PROCESS_GROUP_")
    variables = job_cluster.RAY_ENV_DEFAULTS | job_cluster.NODE_ENV_DEFAULTS
    assert {name for name in variables if name.startswith(checked)} <= set(ENVIRONMENT)


@pytest.mark.parametrize(
    ("make", "attribute"),
    [
        (lambda: resolve("ray.train:WorkerGroupError")("", {0: ValueError()}), "worker_failures"),
        (lambda: resolve("ray.train:ControllerError")(ValueError()), "controller_failure"),
        (lambda: resolve(f"{STATE}:RestartingState")(ValueError()), "training_failed_error"),
        (lambda: resolve(f"{STATE}:ReschedulingState")(ValueError()), "training_failed_error"),
        (
            lambda: resolve(f"{TRAIN}.exceptions:WorkerHealthCheckFailedError")("", ValueError()),
            "health_check_failure",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ray_error_has_expected_attribute(make: Callable[..., Any], attribute: str) -> None:
    assert getattr(make(), attribute)


def test_ray_train_requests_resources_under_the_expected_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name that ``cancel_autoscaler_request`` uses."""
    scaling_config = resolve("ray.train:ScalingConfig")(num_workers=(1, 2), resources_per_worker={"CPU": 1})
    policy = resolve(f"{POLICY}:ElasticScalingPolicy")(scaling_config)
    monkeypatch.setattr(policy, "_send_resource_request", lambda: None)
    policy.after_controller_start(SimpleNamespace(run_id="abc"))
    assert policy._requester_id == "train-abc"


def test_ray_trainer_passes_scaling_policy_as_expected_argument() -> None:
    source = inspect.getsource(resolve(TRAINER).fit)
    assert "_initialize_and_run_controller(" in source
    assert "scaling_policy=" in source
    assert "callbacks=self._create_default_callbacks()" in source


def test_ray_init_resolves_loopback_address_by_expected_function() -> None:
    source = inspect.getsource(resolve("ray._private.worker:init").__wrapped__)
    assert "_node_ip_address = services.resolve_ip_for_localhost(_node_ip_address)" in source
    for argument in ("_node_ip_address", "_temp_dir"):
        assert f'kwargs.pop("{argument}"' in source


def test_ray_placement_group_id_ends_with_job_id() -> None:
    ids = importlib.import_module("ray._raylet")
    job_id = ids.JobID.from_int(7)
    assert ids.PlacementGroupID.of(job_id).hex().endswith(job_id.hex())


def test_ray_starts_autoscaler_with_expected_command_line() -> None:
    source = inspect.getsource(resolve("ray._private.services:start_monitor"))
    assert f'"{ray_extensions.AUTOSCALER_SCRIPT}"' in source
    assert f'"{ray_extensions.CLUSTER_FLAG}' in source
    assert f'"{ray_extensions.CONFIG_FLAG}' in source


# --- the boundary ---


def private_imports(tree: ast.Module) -> Iterator[str]:
    """Names that a module imports from Ray's private modules, as module:name; of a module ``as`` x, all x.name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ray":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if "._" not in full and not full.startswith(INTERNAL_MODULES):
                    continue
                if alias.asname:
                    attributes = (other for other in ast.walk(tree) if isinstance(other, ast.Attribute))
                    names = (other.attr for other in attributes if ast.unparse(other.value) == alias.asname)
                    yield from (f"{full}:{name}" for name in names)
                else:
                    yield f"{node.module}:{alias.name}"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("ray.") and "._" in alias.name)


def private_uses(tree: ast.Module) -> Iterator[str]:
    """Private names of Ray that a module uses in any way: imports, attributes, arguments and strings."""
    yield from private_imports(tree)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            path = ast.unparse(node)
            if node.attr in INTERNAL_ATTRIBUTES or (path.startswith("ray.") and "._" in path):
                yield path
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "ray.init":
            yield from (word.arg for word in node.keywords if word.arg and word.arg.startswith("_"))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from (text for text in INTERNAL_STRINGS if text in node.value)


def test_all_private_imports_of_ray_extensions_have_a_case() -> None:
    tree = ast.parse((ROOT / "job" / "cluster" / "ray_extensions.py").read_text())
    imported = set(private_imports(tree))
    assert len(imported) > 10
    classes = {name.rpartition(".")[0] for name in SIGNATURES if ":" in name.rpartition(".")[0]}
    assert imported <= set(SIGNATURES) | classes


def test_no_other_module_uses_private_names_of_ray() -> None:
    """Only files that contain such a name, or Ray's, are parsed."""
    names = re.compile("|".join([r"\bray\b", *map(re.escape, (*INTERNAL_ATTRIBUTES, *INTERNAL_STRINGS))]))
    texts = {path: path.read_text() for path in (ROOT / "job").rglob("*.py") if path.name != "ray_extensions.py"}
    parsed = [path for path, text in texts.items() if names.search(text)]
    assert len(parsed) > 10
    assert [(path, use) for path in parsed for use in private_uses(ast.parse(texts[path]))] == []


@pytest.mark.parametrize(
    "code",
    [
        "from ray._private.state import state",
        "import ray._private.state",
        "from ray.train.torch.config import _TorchBackend",
        "ray._private.state.available_resources_per_node()",
        "ray.init(_node_ip_address='127.0.0.1')",
        "name == 'WorkerGroupStartupTimeoutError'",
        "importlib.import_module('ray._private.thirdparty.pynvml')",
        "trainer.train_run_context.run_id",
        "from ray.autoscaler.v2.utils import is_autoscaler_v2",
    ],
)
def test_private_uses_finds_private_name(code: str) -> None:
    assert list(private_uses(ast.parse(code)))
