"""The files that deploy the job, checked without a cloud, Docker or Kubernetes; each check is shown to refuse."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from importlib import resources
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from conftest import ROOT, job

from job.cluster.autoscaler import parse_cluster_config
from job.cluster.resources import UNKNOWN_AUTOSCALER

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RAY = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
CLUSTERS = ["cluster.yaml", "clusters/local.yaml"]
pytestmark = pytest.mark.slow  # all together: Ray's own checks are slow to import


def read(name: str) -> str:
    return (ROOT / name).read_text()


def changed(name: str, old: str, new: str) -> str:
    """A file's text with one thing changed."""
    text = read(name)
    assert old in text, f"{name} no longer has {old!r}"
    return text.replace(old, new)


def refuses(check, text: str) -> str:
    """What a check says of a text that it must refuse."""
    with pytest.raises((Exception, SystemExit)) as refusal:
        check(text)
    return str(refusal.value)


# --- ray up ---------------------------------------------------------------------------------------------------------


def prepared(text: str) -> dict:
    """A cluster file as Ray itself completes and validates it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    return config


def check_cluster(text: str) -> None:
    """Ray accepts the file, and nothing but SSH leads into the cluster."""
    config = prepared(text)
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
    idle = set(yaml.safe_load(text)["metadata"]) - set(re.findall(r"\*(\w+)$", text, re.MULTILINE))
    assert not idle, f"filled in without effect: {idle}"
    assert list(yaml.safe_load(text))[:2] == ["cluster_name", "metadata"]


def check_aws(text: str) -> None:
    """Besides, GPUs come and go, and whoever finds the machines finds them closed."""
    check_cluster(text)
    config = prepared(text)
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


def test_ray_accepts_the_cluster_files():
    check_aws(read("cluster.yaml"))
    check_cluster(read("clusters/local.yaml"))


def test_machines_of_ones_own_that_are_still_to_come_are_waited_for():
    """Of the head's kind and brought one by one; the autoscaler's own file has no word of how many."""

    assert parse_cluster_config(prepared(read("clusters/local.yaml"))) == UNKNOWN_AUTOSCALER


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize(
    ("old", "new", "said"),
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
def test_a_broken_cluster_file_is_refused(name, old, new, said):
    assert said in refuses(check_cluster, changed(name, old, new))


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
def test_a_broken_aws_cluster_is_refused(old, new):
    refuses(check_aws, changed("cluster.yaml", old, new))


def test_a_broken_list_of_machines_is_refused():
    refuses(check_cluster, changed("clusters/local.yaml", "  head_ip: *head\n", ""))


# --- ray up, with an AWS that only this process sees, and an SSH that only writes down --------------------------------


class Recorder:
    """Stands for the processes of ssh and rsync."""

    def __init__(self) -> None:
        self.commands: list[str] = []

    def run(self, command, *_, **__):
        self.commands.append(" ".join(command))
        return subprocess.CompletedProcess(command, 0)

    check_call = run

    def check_output(self, command, *_, **__):
        self.run(command)
        answers = {".Config.Env": b'["HOME=/home/ray"]', "printenv HOME": b"/home/ray", "MemAvailable": b"",
                   "meminfo": b"MemAvailable: 8000000 kB", ".Runtimes": b"nvidia-container-runtime",
                   "command -v": b"/usr/bin/docker"}  # fmt: skip
        return next((answer for question, answer in answers.items() if question in self.commands[-1]), b"")


@pytest.fixture
def aws(monkeypatch, tmp_path):
    """An empty AWS account with what the user must have: a security group and two instance profiles."""
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


def up(text: str) -> tuple[dict, list[str]]:
    """The configuration that ``ray up`` arrives at, and all that it does to the head."""
    from ray.autoscaler._private import command_runner, commands

    recorder, login_shells = Recorder(), command_runner.is_using_login_shells()
    commands.set_using_login_shells(False)
    try:
        config = commands._bootstrap_config(yaml.safe_load(text), no_config_cache=True)
        commands.get_or_create_head_node(config, "cluster.yaml", False, False, True, None, _runner=recorder)
    finally:
        commands.set_using_login_shells(login_shells)
    return config, recorder.commands


def open_to_the_world(ec2) -> list[str]:
    rules = [rule for group in ec2.describe_security_groups()["SecurityGroups"] for rule in group["IpPermissions"]]
    return [str(rule) for rule in rules if {"CidrIp": "0.0.0.0/0"} in rule["IpRanges"]]


def test_ray_up_brings_a_closed_head_and_can_bring_spot_workers(aws):
    text = changed("cluster.yaml", "sg-00000000000000000", aws.group)
    text = text.replace("&market {}", "&market { InstanceMarketOptions: { MarketType: spot } }")
    config, commands = up(text)

    (container,) = [command for command in commands if "docker run" in command]
    assert "auth_token:/home/ray/.ray/auth_token" in container and "--env=RAY_AUTH_MODE=token" in container
    assert "--env RUNS=s3://my-bucket/runs" in container and "--runtime=nvidia" in container
    (start,) = [command for command in commands if "ray start --head" in command]
    assert '{"CPU":0}' in start.replace("\\", "") and "--dashboard-host=127.0.0.1" in start
    assert not [command for command in commands if "a-secret-token" in command]
    assert not open_to_the_world(aws)

    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    worker = config["available_node_types"]["worker"]["node_config"]
    assert worker["InstanceMarketOptions"] == {"MarketType": "spot"}
    AWSNodeProvider(config["provider"], "lanes").create_node(dict(worker), {"ray-node-kind": "worker"}, 1)
    made = [node for group in aws.describe_instances()["Reservations"] for node in group["Instances"]]
    assert sorted(node["InstanceType"] for node in made) == ["g6.xlarge", "m7i.large"]
    assert [node.get("InstanceLifecycle") for node in made] == [None, "spot"]
    assert {group["GroupId"] for node in made for group in node["SecurityGroups"]} == {aws.group}


def test_without_a_group_of_ones_own_ray_opens_ssh_to_the_world(aws):
    from ray.autoscaler._private import commands

    text = changed("cluster.yaml", "      SecurityGroupIds: *security_groups\n", "")
    commands._bootstrap_config(yaml.safe_load(text), no_config_cache=True)
    assert open_to_the_world(aws)  # so cluster.yaml asks for one, and the check above can fail


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
    assert [rest for word, rest in steps if word == "USER"] == ["1000"]  # a number: Kubernetes asks that it is not 0
    runs = [rest for word, rest in steps if word == "RUN"]
    assert len(runs) == 1 and "./install.sh" in runs[0] and "pip install" not in text
    words = [word for word, _ in steps]
    assert words.index("RUN") < text[: text.index("COPY --chown=1000:100 job")].count("\n")  # code after dependencies
    assert "HEALTHCHECK" in words


def test_the_dockerfile_passes_its_linter_and_is_pinned():
    check_dockerfile(read("docker/Dockerfile"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
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
def test_a_broken_dockerfile_is_refused(old, new, said):
    assert said in refuses(check_dockerfile, changed("docker/Dockerfile", old, new))


def test_the_image_is_made_of_what_it_copies_and_of_nothing_else(tmp_path):
    from docker.utils.build import exclude_paths

    for name in ("job/__main__.py", "job/__pycache__/x.pyc", "configs/seed.toml", "constraints.txt", "pyproject.toml",
                 "docker/install.sh", "docker/compose.yaml", ".venv/lib/torch.so", "runs/a/model.safetensors",
                 ".git/config", ".env", "id_rsa", "my-text.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    patterns = [line for line in read(".dockerignore").splitlines() if not line.startswith("#")]
    found = {
        name for name in exclude_paths(str(tmp_path), patterns, "docker/Dockerfile") if (tmp_path / name).is_file()
    }
    found.discard("docker/Dockerfile")  # the builder's own
    copied = " ".join(re.findall(r"^COPY --chown=1000:100 (.+) \S+$", read("docker/Dockerfile"), re.MULTILINE)).split()
    assert found == {
        "job/__main__.py",
        "configs/seed.toml",
        *(name for name in copied if "." in name),
    }
    assert {"job", "configs"} < set(copied) and all((ROOT / name).exists() for name in copied)


def test_the_image_installs_what_the_project_needs_under_its_constraints(tmp_path):
    """The script itself is run by CI; here pip is a stand-in that writes down."""
    (tmp_path / "python").write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then exec {sys.executable} "$@"; fi\n'
        f'echo "$@" > {tmp_path}/said; echo "index=$PIP_EXTRA_INDEX_URL" >> {tmp_path}/said; cat >> {tmp_path}/said\n'
    )
    (tmp_path / "python").chmod(0o755)
    for device, index in (("cpu", "https://download.pytorch.org/whl/cpu"), ("gpu", "")):
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "DEVICE": device, "PIP_EXTRA_INDEX_URL": ""}
        subprocess.run([ROOT / "docker" / "install.sh"], cwd=ROOT, env=environment, check=True)
        words, told, *wanted = (tmp_path / "said").read_text().splitlines()
        assert words == "-m pip install --quiet --constraint constraints.txt --requirement /dev/stdin"
        assert wanted == PROJECT["dependencies"] and told == f"index={index}"


# --- compose --------------------------------------------------------------------------------------------------------


def check_compose(text: str) -> None:
    """The specification's schema, and: a cluster that only this machine reaches, started in order."""
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


def test_the_compose_file_is_valid_and_closed():
    check_compose(read("docker/compose.yaml"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
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
def test_a_broken_compose_file_is_refused(old, new, said):
    assert said in refuses(check_compose, changed("docker/compose.yaml", old, new))


# --- Kubernetes -----------------------------------------------------------------------------------------------------

RAYJOB_FIELDS = {  # those of KubeRay's definition that the manifest may use
    "spec": "activeDeadlineSeconds backoffLimit entrypoint metadata rayClusterSpec runtimeEnvYAML "
    "shutdownAfterJobFinishes submissionMode submitterPodTemplate suspend ttlSecondsAfterFinished",
    "cluster": "authOptions autoscalerOptions enableInTreeAutoscaling headGroupSpec rayVersion workerGroupSpecs",
    "head": "headService labels rayStartParams serviceType template",
    "worker": "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts rayStartParams replicas template",
}


def check_rayjob(text: str) -> None:
    """The pods pass Kubernetes' own schema and its restricted profile; the rest is what KubeRay knows."""
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


def test_the_rayjob_is_what_kubernetes_and_kuberay_take():
    check_rayjob(read("clusters/rayjob.yaml"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
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
def test_a_broken_rayjob_is_refused(old, new, said):
    assert said in refuses(check_rayjob, changed("clusters/rayjob.yaml", old, new))


# --- what they have in common ---------------------------------------------------------------------------------------


def test_all_files_name_the_same_image():
    for name in [*CLUSTERS, "clusters/rayjob.yaml", "docker/compose.yaml", "docker/Dockerfile"]:
        assert set(re.findall(r"\blanes:([0-9.]+)-[cg]pu", read(name))) == {PROJECT["version"]}, name


@pytest.mark.parametrize("name", ["clusters/rayjob.yaml", "docker/compose.yaml", "README.md"])
def test_the_commands_that_they_run_are_those_of_the_job(name, tmp_path, monkeypatch):
    """Each line is run up to where it wants a cluster or a text that is not there."""
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


def test_a_run_lies_where_the_clusters_environment_says(prose, tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", str(tmp_path / "shared"))
    words = ["--corpus.source", prose, "--corpus.max_tokens", "2000", "--train.epochs", "1", "--scale.workers", "0"]
    assert job("train", *words, "--run.name", "there", "--run.storage", "$RUNS").status == 0
    assert json.loads((tmp_path / "shared" / "there" / "result.json").read_text())["epochs"] == 1


def working_directory(folder: Path, to: Path) -> set[str]:
    """What ``ray job submit --working-dir`` sends of a folder, by Ray's own packing."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    create_package(str(folder), to, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(to) as packed:
        return {name for name in packed.namelist() if not name.endswith("/")}


KEPT = {"job/__main__.py", "job/__init__.py", "configs/seed.toml", "my_cells.py", "cells/gated.py"}


@pytest.mark.parametrize("ignore", [True, False])
def test_only_code_and_configurations_travel_with_a_job(tmp_path, ignore):
    folder = tmp_path / "project"
    heavy = {".venv/lib/torch.so", ".git/objects/ab", "runs/a/checkpoints/b/manifest.json", "my-text.txt",
             "corpora/book", "model.safetensors", ".mypy_cache/x.py", "tests/test_x.py", "secret.pem", ".env",
             "elsewhere/a/metrics.jsonl", "job/__pycache__/x.pyc", "build/lib/job/x.py", "book.txt.gz"}  # fmt: skip
    for name in KEPT | heavy:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    if ignore:
        for name in (".gitignore", ".rayignore"):
            (folder / name).write_text(read(name))
    sent = working_directory(folder, tmp_path / "sent.zip")
    assert sent == KEPT if ignore else sent > KEPT  # without the two files the heavy ones go too


def test_this_projects_working_directory_is_small(tmp_path):
    sent = working_directory(ROOT, tmp_path / "sent.zip")
    assert {f"job/{path.name}" for path in (ROOT / "job").glob("*.py")} | {"configs/seed.toml"} <= sent
    assert not [name for name in sent if name.startswith(("tests/", "benchmarks/", "runs/", "."))]
    assert (tmp_path / "sent.zip").stat().st_size < 2**20
