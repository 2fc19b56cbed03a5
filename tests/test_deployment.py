"""Deployment files, checked without a cloud, Docker or Kubernetes. Each check must also reject broken files."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from conftest import ROOT, job, not_none

from job.cluster.resources import parse_cluster_config

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RAY = not_none(re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))[1]
CLUSTERS = ["cluster.yaml", "clusters/local.yaml"]
pytestmark = pytest.mark.slow  # Ray's validators take long to import


def read(name: str) -> str:
    return (ROOT / name).read_text()


def replaced(name: str, old: str, new: str) -> str:
    """The text of a file with one replacement."""
    text = read(name)
    assert old in text, f"{name} no longer has {old!r}"
    return text.replace(old, new)


def rejection(check: Callable[[str], object], text: str) -> str:
    """The message with which a check rejects a text."""
    with pytest.raises((Exception, SystemExit)) as error:
        check(text)
    return str(error.value)


# --- ray up ---------------------------------------------------------------------------------------------------------


def validated(text: str) -> dict[str, Any]:
    """A cluster file as Ray completes and validates it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    return config


def check_cluster(text: str) -> None:
    """Ray accepts the file, and the cluster can be reached only by SSH."""
    config = validated(text)
    options = config["docker"]["run_options"]
    assert "--env=RAY_AUTH_MODE=token" in options
    assert "--cap-drop=ALL" in options and "--security-opt=no-new-privileges" in options
    assert not [
        option for option in options if "publish" in option or "privileged" in option.removesuffix("-privileges")
    ]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    starts = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert len(starts) == 1 and "--dashboard-host=127.0.0.1" in starts[0] and "--autoscaling-config=" in starts[0]
    unused = set(yaml.safe_load(text)["metadata"]) - set(re.findall(r"\*(\w+)$", text, re.MULTILINE))
    assert not unused, f"no line refers to: {unused}"
    assert list(yaml.safe_load(text))[:2] == ["cluster_name", "metadata"]


def check_aws(text: str) -> None:
    """In addition, GPU machines are started and terminated on demand, with security groups and IMDSv2."""
    check_cluster(text)
    config = validated(text)
    head, worker = (config["available_node_types"][name] for name in ("head", "worker"))
    assert config["head_node_type"] == "head" and head["max_workers"] == 0
    assert head["node_config"]["InstanceType"][0] not in "gp" and head["resources"] == {"CPU": 0}
    assert worker["min_workers"] == 0 and worker["max_workers"] == config["max_workers"] > 0
    assert worker["node_config"]["InstanceType"][0] in "gp" and 0 < config["idle_timeout_minutes"] <= 15
    assert config["provider"]["cache_stopped_nodes"] is False
    for node in (head, worker):
        assert (
            node["node_config"]["SecurityGroupIds"]
            and node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        )
    assert head["node_config"]["IamInstanceProfile"] != worker["node_config"]["IamInstanceProfile"]


def test_cluster_files_are_accepted_by_ray() -> None:
    check_aws(read("cluster.yaml"))
    check_cluster(read("clusters/local.yaml"))


def test_limits_of_local_cluster_are_unknown() -> None:
    """Its machines are of the head's node type and join one by one; the autoscaler's file has no maximum."""
    assert parse_cluster_config(validated(read("clusters/local.yaml"))) is None


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cluster_name:", "cluster_nane:", "cluster_name"),
        ("ssh_user:", "ssh_usr:", "ssh_usr"),
        ("container_name:", "container:", "container"),
        ("    - --env=RAY_AUTH_MODE=token\n", "", "RAY_AUTH_MODE"),
        ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "dashboard-host"),
        ("  - chmod 600 ~/.ray/auth_token\n", "  []\n", "chmod"),
        ("--cap-drop=ALL", "--privileged", "cap-drop"),
        ("  image: *image", "  image: some:image", "{'image'}"),
        ("    - *runs", "    - RUNS=elsewhere", "{'runs'}"),
    ],
)
def test_check_cluster_rejects_broken_file(name: str, old: str, new: str, message: str) -> None:
    assert message in rejection(check_cluster, replaced(name, old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("min_workers: 0", "min_workers: five"),
        ("min_workers: 0", "min_workers: 1"),
        ("    resources: {} #", "    resource: {} #"),
        ("InstanceType: m7i.large", "InstanceType: g6.xlarge"),
        ("cache_stopped_nodes: false", "cache_stopped_nodes: true"),
        ("      SecurityGroupIds: *security_groups\n", ""),
        ("IamInstanceProfile: *worker_profile", "IamInstanceProfile: *head_profile"),
        ("HttpTokens: required", "HttpTokens: optional"),
    ],
)
def test_check_aws_rejects_broken_file(old: str, new: str) -> None:
    rejection(check_aws, replaced("cluster.yaml", old, new))


def test_check_cluster_without_head_ip_rejects_file() -> None:
    rejection(check_cluster, replaced("clusters/local.yaml", "  head_ip: *head\n", ""))


# --- ray up, with a simulated AWS, and SSH commands that are only recorded -------------------------------------------


class RecordedProcesses:
    """Replaces the subprocess module for ssh and rsync."""

    def __init__(self) -> None:
        self.commands: list[str] = []

    def run(self, command: list[str], *_: object, **__: object) -> subprocess.CompletedProcess[bytes]:
        self.commands.append(" ".join(command))
        return subprocess.CompletedProcess(command, 0)

    check_call = run

    def check_output(self, command: list[str], *_: object, **__: object) -> bytes:
        self.run(command)
        answers = {".Config.Env": b'["HOME=/home/ray"]', "printenv HOME": b"/home/ray", "MemAvailable": b"",
                   "meminfo": b"MemAvailable: 8000000 kB", ".Runtimes": b"nvidia-container-runtime",
                   "command -v": b"/usr/bin/docker"}  # fmt: skip
        return next((answer for question, answer in answers.items() if question in self.commands[-1]), b"")


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A simulated AWS account with what the user must create: a security group and two instance profiles."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws import config, node_provider, utils

    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("a-secret-token")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("RAY_UP_enable_autoscaler_v2", "1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setattr(node_provider, "TAG_BATCH_DELAY", 0)
    for cached in (utils.resource_cache, utils.client_cache, config._get_subnets_or_die):
        cached.cache_clear()
    region = yaml.safe_load(read("cluster.yaml"))["metadata"]["region"]
    with mock_aws():
        ec2, iam = boto3.client("ec2", region), boto3.client("iam", region)
        for profile in ("lanes-head", "lanes-worker"):
            iam.create_instance_profile(InstanceProfileName=profile)
        vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        ec2.group = ec2.create_security_group(GroupName="mine", Description="mine", VpcId=vpc)["GroupId"]
        yield ec2


def up(text: str) -> tuple[dict[str, Any], list[str]]:
    """The configuration that ``ray up`` resolves, and the commands that it runs for the head."""
    from ray.autoscaler._private import command_runner, commands

    processes, login_shells = RecordedProcesses(), command_runner.is_using_login_shells()
    commands.set_using_login_shells(False)
    try:
        config = commands._bootstrap_config(yaml.safe_load(text), no_config_cache=True)
        commands.get_or_create_head_node(config, "cluster.yaml", False, False, True, None, _runner=processes)
    finally:
        commands.set_using_login_shells(login_shells)
    return config, processes.commands


def rules_open_to_world(ec2: Any) -> list[str]:
    rules = [rule for group in ec2.describe_security_groups()["SecurityGroups"] for rule in group["IpPermissions"]]
    return [str(rule) for rule in rules if {"CidrIp": "0.0.0.0/0"} in rule["IpRanges"]]


def test_ray_up_starts_closed_head_and_can_start_spot_workers(aws: SimpleNamespace) -> None:
    text = replaced("cluster.yaml", "sg-00000000000000000", aws.group)
    text = text.replace("&market {}", "&market { InstanceMarketOptions: { MarketType: spot } }")
    config, commands = up(text)

    (container,) = [command for command in commands if "docker run" in command]
    assert "auth_token:/home/ray/.ray/auth_token" in container and "--env=RAY_AUTH_MODE=token" in container
    assert "--env RUNS=s3://my-bucket/runs" in container and "--runtime=nvidia" in container
    (start,) = [command for command in commands if "ray start --head" in command]
    assert '{"CPU":0}' in start.replace("\\", "") and "--dashboard-host=127.0.0.1" in start
    assert not [command for command in commands if "a-secret-token" in command]
    assert not rules_open_to_world(aws)

    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    worker = config["available_node_types"]["worker"]["node_config"]
    assert worker["InstanceMarketOptions"] == {"MarketType": "spot"}
    AWSNodeProvider(config["provider"], "lanes").create_node(dict(worker), {"ray-node-kind": "worker"}, 1)
    instances = [node for group in aws.describe_instances()["Reservations"] for node in group["Instances"]]
    assert sorted(node["InstanceType"] for node in instances) == ["g6.xlarge", "m7i.large"]
    assert [node.get("InstanceLifecycle") for node in instances] == [None, "spot"]
    assert {group["GroupId"] for node in instances for group in node["SecurityGroups"]} == {aws.group}


def test_ray_up_without_security_group_opens_ssh_to_world(aws: SimpleNamespace) -> None:
    from ray.autoscaler._private import commands

    text = replaced("cluster.yaml", "      SecurityGroupIds: *security_groups\n", "")
    commands._bootstrap_config(yaml.safe_load(text), no_config_cache=True)
    assert rules_open_to_world(aws)  # which is why cluster.yaml requires a group


# --- the image ------------------------------------------------------------------------------------------------------


def hadolint(text: str) -> None:
    linter = Path(sys.executable).parent / "hadolint"
    ended = subprocess.run([linter, "--no-color", "-"], check=False, input=text, text=True, capture_output=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def check_dockerfile(text: str) -> None:
    hadolint(text)
    steps = re.findall(r"^([A-Z]+) (.+)$", text, re.MULTILINE)
    image = [rest for word, rest in steps if word == "FROM"]
    assert image == [f"rayproject/ray:{RAY}-py311-${{DEVICE}}"]
    assert [rest for word, rest in steps if word == "USER"] == [
        "1000"
    ]  # a number, so that Kubernetes can check that it is not 0
    runs = [rest for word, rest in steps if word == "RUN"]
    assert len(runs) == 1 and "./install.sh" in runs[0] and "pip install" not in text
    words = [word for word, _ in steps]
    assert words.index("RUN") < text[: text.index("COPY --chown=1000:100 job")].count("\n")  # code after dependencies
    assert "HEALTHCHECK" in words


def test_dockerfile_is_accepted_by_hadolint_and_pinned() -> None:
    check_dockerfile(read("docker/Dockerfile"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("COPY --chown=1000:100 job job", "COPPY job job", "unexpected"),
        ("USER 1000", "USER root", "DL3002"),
        ("WORKDIR /home/ray/lanes", "WORKDIR lanes", "DL3000"),
        (f"ray:{RAY}-py311-${{DEVICE}}", "ray", "DL3006"),
        (f"ray:{RAY}-", "ray:2.0.0-", "2.0.0"),
        ("./install.sh", "cd /x && pip install ray", "DL3"),
        ("mkdir -p", "sudo mkdir -p", "DL3004"),
        ("HEALTHCHECK", "# HEALTHCHECK", "HEALTHCHECK"),
    ],
)
def test_check_dockerfile_rejects_broken_file(old: str, new: str, message: str) -> None:
    assert message in rejection(check_dockerfile, replaced("docker/Dockerfile", old, new))


def test_build_context_contains_only_copied_files(tmp_path: Path) -> None:
    from docker.utils.build import exclude_paths

    for name in ("job/__main__.py", "job/__pycache__/x.pyc", "configs/seed.toml", "constraints.txt", "pyproject.toml",
                 "docker/install.sh", "docker/compose.yaml", ".venv/lib/torch.so", "runs/a/model.safetensors",
                 ".git/config", ".env", "id_rsa", "my-text.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    patterns = [line for line in read(".dockerignore").splitlines() if not line.startswith("#")]
    context = {
        name for name in exclude_paths(str(tmp_path), patterns, "docker/Dockerfile") if (tmp_path / name).is_file()
    }
    context.discard("docker/Dockerfile")  # always in the context
    copied = " ".join(re.findall(r"^COPY --chown=1000:100 (.+) \S+$", read("docker/Dockerfile"), re.MULTILINE)).split()
    assert context == {
        "job/__main__.py",
        "configs/seed.toml",
        *(name for name in copied if "." in name),
    }
    assert {"job", "configs"} < set(copied) and all((ROOT / name).exists() for name in copied)


def test_install_script_installs_dependencies_under_constraints(tmp_path: Path) -> None:
    """CI runs the script; here a fake ``python`` records how pip is called."""
    (tmp_path / "python").write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then exec {sys.executable} "$@"; fi\n'
        f'exec > {tmp_path}/pip.log; echo "$@"; echo "index=$PIP_EXTRA_INDEX_URL"; cat\n'
    )
    (tmp_path / "python").chmod(0o755)
    for device, index in (("cpu", "https://download.pytorch.org/whl/cpu"), ("gpu", "")):
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "DEVICE": device, "PIP_EXTRA_INDEX_URL": ""}
        subprocess.run([ROOT / "docker" / "install.sh"], cwd=ROOT, env=environment, check=True)
        arguments, index_url, *requirements = (tmp_path / "pip.log").read_text().splitlines()
        assert arguments == "-m pip install --quiet --constraint constraints.txt --requirement /dev/stdin"
        assert requirements == PROJECT["dependencies"] and index_url == f"index={index}"


# --- compose --------------------------------------------------------------------------------------------------------


def check_compose(text: str) -> None:
    """The file follows the specification's schema and describes a cluster that only this machine can reach."""
    schema = resources.files("check_jsonschema.builtin_schemas.vendor") / "compose-spec.json"
    jsonschema.validate(yaml.safe_load(text), json.loads(schema.read_text()))
    compose = yaml.safe_load(text)
    services = compose["services"]
    for service in services.values():
        assert service["image"] == f"lanes:{PROJECT['version']}-cpu"
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
        assert {volume.split(":")[0] for volume in service["volumes"]} == set(compose["volumes"]) == {"token", "runs"}
        assert not [port for port in service.get("ports", []) if not port.startswith("127.0.0.1:")]
        assert set(service.get("depends_on", {})) <= set(services)
    assert "umask 077" in shlex.join(services["token"]["command"])
    assert services["worker"]["deploy"]["replicas"] == 2 and "--num-cpus=0" in services["head"]["command"]
    conditions = {name: {k: v["condition"] for k, v in s.get("depends_on", {}).items()} for name, s in services.items()}
    assert conditions == {
        "token": {},
        "head": {"token": "service_completed_successfully"},
        "worker": {"head": "service_healthy"},
        "job": {"worker": "service_healthy"},
    }


def test_compose_file_is_valid_and_closed() -> None:
    check_compose(read("docker/compose.yaml"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    command: [ray, start, --head", "    comand: [ray, start, --head", "comand"),
        ("deploy: { replicas: 2 }", "deploy: { replicas: two }", "two"),
        ('"127.0.0.1:8265:8265"', '"8265:8265"', "8265"),
        ("condition: service_healthy", "condition: service_well", "service_well"),
        ("condition: service_healthy", "condition: service_started", "service_started"),
        ("      head: { condition", "      heat: { condition", "heat"),
        ("RAY_AUTH_MODE: token", "RAY_AUTH_MODE: disabled", "disabled"),
        ("umask 077 && ", "", "umask 077"),
        ("  cap_drop: [ALL]\n", "", "cap_drop"),
        (f"lanes:{PROJECT['version']}-cpu", "lanes:9.9.9-cpu", "9.9.9"),
    ],
)
def test_check_compose_rejects_broken_file(old: str, new: str, message: str) -> None:
    assert message in rejection(check_compose, replaced("docker/compose.yaml", old, new))


# --- Kubernetes -----------------------------------------------------------------------------------------------------

RAYJOB_FIELDS = {  # fields of KubeRay's definition that the manifest may use
    "spec": "activeDeadlineSeconds backoffLimit entrypoint metadata rayClusterSpec runtimeEnvYAML "
    "shutdownAfterJobFinishes submissionMode submitterPodTemplate suspend ttlSecondsAfterFinished",
    "cluster": "authOptions autoscalerOptions enableInTreeAutoscaling headGroupSpec rayVersion workerGroupSpecs",
    "head": "headService labels rayStartParams serviceType template",
    "worker": "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts rayStartParams replicas template",
}


def check_rayjob(text: str) -> None:
    """The pods follow Kubernetes' schema and its restricted profile; the other fields are KubeRay's."""
    manifest = yaml.safe_load(text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    spec = manifest["spec"]
    cluster = spec["rayClusterSpec"]
    head, (worker,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    for name, part in {"spec": spec, "cluster": cluster, "head": head, "worker": worker}.items():
        unknown = set(part) - set(RAYJOB_FIELDS[name].split())
        assert not unknown, unknown
    for template in (spec["submitterPodTemplate"], head["template"], worker["template"]):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"] and security["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = template["spec"]["containers"]
        for guarded in (container, cluster["autoscalerOptions"]):
            security = guarded["securityContext"]
            assert not security["allowPrivilegeEscalation"] and security["capabilities"] == {"drop": ["ALL"]}
            assert guarded["resources"]["limits"].keys() >= {"cpu", "memory"}
        assert container["image"] == manifest["metadata"]["annotations"]["lanes/image"]
    assert cluster["rayVersion"] == RAY and cluster["authOptions"] == {"mode": "token"}
    assert head["serviceType"] == "ClusterIP" and head["rayStartParams"] == {"num-cpus": "0"}
    assert (
        cluster["enableInTreeAutoscaling"] and worker["minReplicas"] == worker["replicas"] == 0 < worker["maxReplicas"]
    )
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 1
    assert spec["shutdownAfterJobFinishes"] is True


def test_rayjob_is_valid() -> None:
    check_rayjob(read("clusters/rayjob.yaml"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("runAsNonRoot: true", "runAsNonRoot: sure", "sure"),
        ("runAsNonRoot: true", "runAsNonRot: true", "runAsNonRot"),
        ("allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true", "not True"),
        ("restartPolicy: Never", "restartpolicy: Never", "restartpolicy"),
        ("              env: &env", "              enviroment: &env", "env"),
        (f"rayVersion: {RAY}", "rayVersion: 2.0.0", "2.0.0"),
        ("    authOptions: { mode: token }\n", "", "authOptions"),
        ("minReplicas: 0", "minReplica: 0", "minReplica"),
        ("serviceType: ClusterIP", "serviceType: LoadBalancer", "LoadBalancer"),
        ("shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false", "False is True"),
        ("              image: *image", "              image: other", "other"),
    ],
)
def test_check_rayjob_rejects_broken_file(old: str, new: str, message: str) -> None:
    assert message in rejection(check_rayjob, replaced("clusters/rayjob.yaml", old, new))


def test_network_policy_admits_pods_of_cluster_operator_and_submitter() -> None:
    policy = yaml.safe_load(read("clusters/network-policy.yaml"))
    kubernetes_validate.validate(policy, kubernetes_validate.latest_version(), strict=True)
    spec = policy["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    ray_pods = {"matchLabels": {"ray.io/is-ray-node": "yes"}}  # KubeRay: controllers/ray/utils/constant.go
    assert spec["podSelector"] == ray_pods
    within, dashboard = spec["ingress"]
    assert within == {"from": [{"podSelector": ray_pods}]}
    assert dashboard["ports"] == [{"port": 8265}]
    template = yaml.safe_load(read("clusters/rayjob.yaml"))["spec"]["submitterPodTemplate"]
    assert {"podSelector": {"matchLabels": template["metadata"]["labels"]}} in dashboard["from"]


# --- all files ---------------------------------------------------------------------------------------


def test_all_files_name_same_image() -> None:
    for name in [*CLUSTERS, "clusters/rayjob.yaml", "docker/compose.yaml", "docker/Dockerfile"]:
        assert set(re.findall(r"\blanes:([0-9.]+)-[cg]pu", read(name))) == {PROJECT["version"]}, name


@pytest.mark.parametrize("name", ["clusters/rayjob.yaml", "docker/compose.yaml", "README.md"])
def test_commands_in_files_are_accepted_by_job(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command runs until it reads a corpus that does not exist."""
    monkeypatch.setenv("RUNS", str(tmp_path))
    monkeypatch.chdir(ROOT)
    text = read(name).replace("\\\n", " ").replace("$$", "$")
    lines = re.findall(r"python -m job train (configs/\S+ .*\$RUNS.*)$", text, re.MULTILINE)
    assert lines
    for line in lines:
        ended = job("train", *shlex.split(line), "--corpus.source", str(tmp_path / "absent.txt"))
        assert ended.status == 2 and "absent.txt" in ended.err, ended.err
        ended = job("train", *shlex.split(line.replace("scale.", "scales.")))
        assert ended.status == 2 and "scales" in ended.err


def test_run_storage_expands_environment_variable(prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path / "shared"))
    words = ["--corpus.source", prose, "--corpus.max_tokens", "2000", "--train.epochs", "1", "--scale.workers", "0"]
    assert job("train", *words, "--run.name", "there", "--run.storage", "$RUNS").status == 0
    assert json.loads((tmp_path / "shared" / "there" / "result.json").read_text())["epochs"] == 1
