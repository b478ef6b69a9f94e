"""cluster/'s manifests: Ray's schema for `ray up`, KubeRay's fields, the README's steps, and no secret anywhere."""

import copy
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from muser_dist import __version__
from muser_dist.cli import parse_runs
from muser_dist.data.config import DataConfig
from preflight import BLOCK_BYTES

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|ACCESS_KEY|CREDENTIAL")
LITERAL = re.compile(r"\b(?:[0-9a-f]{32,}|AKIA[0-9A-Z]{16}|hf_\w{20,}|gh[pousr]_\w{20,})\b")


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


# --- ray up ---


def test_ray_takes_the_ray_up_file():
    config = prepare_config(load("ray-up.yaml"))
    validate_config(config)
    types = load("ray-up.yaml")["available_node_types"]
    assert types["trainer"]["resources"]["GPU"] > 0 and "GPU" not in types["decoder"]["resources"]
    for node in (types["trainer"], types["decoder"]):
        assert 0 < node["min_workers"] <= node["max_workers"]
    assert sum(node.get("max_workers", 0) for node in types.values()) <= config["max_workers"]
    for local in config["file_mounts"].values():
        assert local.startswith("~/.ray/") or (ROOT / local).exists(), local
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config | {"head_nodes": {}})


def test_ray_up_starts_with_a_token_and_an_inner_dashboard():
    config = load("ray-up.yaml")
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in command.partition("ray start")[0]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    for rule in config["provider"]["security_group"]["IpPermissions"]:
        assert rule["FromPort"] == rule["ToPort"] == 22
        assert all(not span["CidrIp"].endswith("/0") for span in rule["IpRanges"])


# --- KubeRay: the fields of ray.io/v1 in KubeRay 1.6, as far as they are known ---

ANY = None
RESOURCES = {"requests": ANY, "limits": ANY, "claims": ANY}
ENV = [{"name": ANY, "value": ANY, "valueFrom": {"secretKeyRef": {"name": ANY, "key": ANY, "optional": ANY}}}]
CONTAINER = {
    "name": ANY,
    "image": ANY,
    "imagePullPolicy": ANY,
    "command": ANY,
    "args": ANY,
    "env": ENV,
    "ports": [{"name": ANY, "containerPort": ANY, "protocol": ANY}],
    "resources": RESOURCES,
    "securityContext": ANY,
    "lifecycle": ANY,
    "livenessProbe": ANY,
    "readinessProbe": ANY,
    "volumeMounts": [{"name": ANY, "mountPath": ANY, "subPath": ANY, "readOnly": ANY}],
}
POD = {
    "metadata": {"labels": ANY, "annotations": ANY},
    "spec": {
        "containers": [CONTAINER],
        "initContainers": [CONTAINER],
        "volumes": [
            {
                "name": ANY,
                "emptyDir": {"medium": ANY, "sizeLimit": ANY},
                "persistentVolumeClaim": {"claimName": ANY, "readOnly": ANY},
            }
        ],
        "securityContext": ANY,
        "automountServiceAccountToken": ANY,
        "serviceAccountName": ANY,
        "imagePullSecrets": ANY,
        "nodeSelector": ANY,
        "affinity": ANY,
        "tolerations": [{"key": ANY, "operator": ANY, "value": ANY, "effect": ANY, "tolerationSeconds": ANY}],
        "restartPolicy": ANY,
        "terminationGracePeriodSeconds": ANY,
    },
}
GROUP = {"rayStartParams": ANY, "template": POD, "resources": ANY, "labels": ANY}
CLUSTER_SPEC = {
    "rayVersion": ANY,
    "authOptions": {"mode": ANY, "secretName": ANY, "enableK8sTokenAuth": ANY},
    "enableInTreeAutoscaling": ANY,
    "autoscalerOptions": {
        "version": ANY,
        "idleTimeoutSeconds": ANY,
        "upscalingMode": ANY,
        "resources": RESOURCES,
        "image": ANY,
        "imagePullPolicy": ANY,
        "env": ENV,
        "envFrom": ANY,
        "securityContext": ANY,
        "volumeMounts": ANY,
    },
    "headGroupSpec": GROUP | {"serviceType": ANY, "headService": ANY, "enableIngress": ANY},
    "workerGroupSpecs": [
        GROUP
        | {
            "groupName": ANY,
            "replicas": ANY,
            "minReplicas": ANY,
            "maxReplicas": ANY,
            "idleTimeoutSeconds": ANY,
            "numOfHosts": ANY,
            "scaleStrategy": ANY,
            "suspend": ANY,
        }
    ],
    "headServiceAnnotations": ANY,
    "gcsFaultToleranceOptions": ANY,
    "managedBy": ANY,
    "suspend": ANY,
    "upgradeStrategy": ANY,
}
JOB_SPEC = {
    "entrypoint": ANY,
    "runtimeEnvYAML": ANY,
    "jobId": ANY,
    "submissionMode": ANY,
    "submitterConfig": ANY,
    "submitterPodTemplate": POD,
    "rayClusterSpec": CLUSTER_SPEC,
    "clusterSelector": ANY,
    "metadata": ANY,
    "entrypointNumCpus": ANY,
    "entrypointNumGpus": ANY,
    "entrypointResources": ANY,
    "shutdownAfterJobFinishes": ANY,
    "ttlSecondsAfterFinished": ANY,
    "activeDeadlineSeconds": ANY,
    "backoffLimit": ANY,
    "deletionStrategy": ANY,
    "managedBy": ANY,
    "suspend": ANY,
}
TOP = {"apiVersion": ANY, "kind": ANY, "metadata": {"name": ANY, "namespace": ANY, "labels": ANY, "annotations": ANY}}


def unknown(value: Any, known: Any, path: str) -> Iterator[str]:
    """Fields that are not among those that are known; ANY is looked into no further."""
    if known is ANY:
        return
    if isinstance(known, list):
        if not isinstance(value, list):
            yield f"{path} is no list"
            return
        for number, entry in enumerate(value):
            yield from unknown(entry, known[0], f"{path}[{number}]")
        return
    if not isinstance(value, dict):
        yield f"{path} is no mapping"
        return
    for name, entry in value.items():
        if name not in known:
            yield f"{path}.{name} is unknown"
        else:
            yield from unknown(entry, known[name], f"{path}.{name}")


def gibibytes(size: str) -> int:
    """Bytes of a Kubernetes quantity in Gi."""
    return int(size.removesuffix("Gi")) << 30


def problems(manifest: dict[str, Any]) -> Iterator[str]:
    """What KubeRay would refuse or ignore, and what would make a bad cluster, in a RayCluster or RayJob."""
    kind = manifest["kind"]
    schema = {"RayCluster": CLUSTER_SPEC, "RayJob": JOB_SPEC}[kind]
    if manifest["apiVersion"] != "ray.io/v1":
        yield "apiVersion is not ray.io/v1"
    yield from unknown(manifest, TOP | {"spec": schema}, kind)
    spec = manifest["spec"]["rayClusterSpec"] if kind == "RayJob" else manifest["spec"]
    if spec.get("authOptions", {}).get("mode") != "token" or not spec["authOptions"].get("secretName"):
        yield "authOptions does not ask for a token out of a Secret"
    if spec["headGroupSpec"].get("serviceType") != "ClusterIP" or spec["headGroupSpec"].get("enableIngress"):
        yield "the head's ports are open to the world"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    if "nvidia.com/gpu" not in groups["trainers"]["template"]["spec"]["containers"][0]["resources"]["limits"]:
        yield "trainers have no GPU"
    for name, group in groups.items():
        if not 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{name}: replicas are not between minReplicas and maxReplicas"
    for name, group in {"head": spec["headGroupSpec"], **groups}.items():
        yield from (f"{name}: {problem}" for problem in problems_of_group(group))


def problems_of_group(group: dict[str, Any]) -> Iterator[str]:
    if not all(isinstance(value, str) for value in group["rayStartParams"].values()):
        yield "rayStartParams must be strings"
    pod = group["template"]["spec"]
    if not pod.get("securityContext", {}).get("runAsNonRoot"):
        yield "may run as root"
    sizes = {volume["name"]: volume.get("emptyDir", {}).get("sizeLimit") for volume in pod["volumes"]}
    for container in pod["containers"]:
        if not container.get("name") or not container.get("image"):
            yield "a container lacks its name or image"
        limits, requests = container["resources"].get("limits", {}), container["resources"].get("requests", {})
        if not {"cpu", "memory"} <= set(limits) or limits != requests:
            yield "limits of cpu and memory must be there, and be requested"
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        if not set(mounts.values()) <= set(sizes):
            yield "mounts a volume that is not there"
        store = int(group["rayStartParams"]["object-store-memory"])
        if not store <= gibibytes(sizes[mounts["/dev/shm"]]) < gibibytes(limits["memory"]):
            yield "/dev/shm does not hold the object store, or takes all memory"
        if "/shared" not in mounts:
            yield "does not see the shared storage"
        for variable in container.get("env", []):
            if SECRET.search(variable["name"]) and (
                "value" in variable or "secretKeyRef" not in variable.get("valueFrom", {})
            ):
                yield f"{variable['name']} does not come from a Secret"


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_knows_every_field(name):
    assert list(problems(load(name))) == []


def head(spec: dict[str, Any]) -> dict[str, Any]:
    return spec["headGroupSpec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    ("break_it", "problem"),
    [
        (lambda spec: spec.update(headGroupSpecs={}), "RayCluster.spec.headGroupSpecs is unknown"),
        (lambda spec: head(spec).update(volumemounts=[]), "volumemounts is unknown"),
        (lambda spec: head(spec)["env"].append({"name": "HF_TOKEN", "value": "x"}), "HF_TOKEN does not come from"),
        (lambda spec: spec["workerGroupSpecs"][0].update(maxReplicas=1), "trainers: replicas are not between"),
        (lambda spec: spec.pop("authOptions"), "authOptions does not ask for a token"),
        (lambda spec: spec["headGroupSpec"].update(serviceType="LoadBalancer"), "open to the world"),
        (lambda spec: head(spec)["resources"].pop("limits"), "head: limits of cpu and memory"),
        (lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "must be strings"),
    ],
)
def test_a_broken_manifest_is_noticed(break_it: Callable[[dict[str, Any]], Any], problem: str):
    manifest = copy.deepcopy(load("raycluster.yaml"))
    break_it(manifest["spec"])
    assert any(problem in found for found in problems(manifest))


def test_the_job_runs_on_that_cluster_and_its_command_is_one():
    cluster, job = load("raycluster.yaml")["spec"], load("rayjob.yaml")["spec"]
    assert job["rayClusterSpec"] == cluster
    trainers, decoders = cluster["workerGroupSpecs"]
    python, script, *arguments = shlex.split(job["entrypoint"])
    assert (python, script) == ("python", "jobs/pretrain.py")
    (config,) = parse_runs(arguments, script)
    assert config.train.gpu and config.train.workers <= trainers["minReplicas"]
    assert config.train.cpus_per_worker == float(trainers["rayStartParams"]["num-cpus"])
    paths = [config.storage, *config.data.train, *config.data.val]
    assert all(path.startswith("/shared/") for path in paths)
    slots = int(decoders["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    needed = (DataConfig.buffer_mib << 20) + 3 * slots * BLOCK_BYTES
    assert int(decoders["rayStartParams"]["object-store-memory"]) >= needed
    assert not SECRET.search(job["runtimeEnvYAML"]) and yaml.safe_load(job["runtimeEnvYAML"])


def test_versions_are_those_of_the_lock_file_and_the_package():
    (ray,) = re.findall(r"^ray\[?.*?==([\d.]+)", (ROOT / "requirements.lock").read_text(), re.M)
    cluster = load("raycluster.yaml")["spec"]
    assert cluster["rayVersion"] == ray
    assert head(cluster)["image"].endswith(f"/muser_dist:{__version__}")
    assert f"muser_dist:{__version__}" in (CLUSTER / "Dockerfile").read_text()


def test_the_policy_admits_the_cluster_and_the_operator_alone():
    policy = load("networkpolicy.yaml")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    for rule in policy["ingress"]:
        assert all("podSelector" in source and "ipBlock" not in source for source in rule["from"])
    labels = policy["podSelector"]["matchLabels"].items()
    cluster = load("raycluster.yaml")["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert labels <= group["template"]["metadata"]["labels"].items()


# --- The image ---


def test_the_image_is_made_by_the_readmes_steps():
    lines = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    readme = (ROOT / "README.md").read_text()
    assert "needs Python 3.11 or 3.12 and make; both commands make `.venv` from the lock file" in readme
    (base,) = (value for step, value in steps if step == "FROM")
    assert re.match(r"python:3\.1[12]-", base)
    runs = [value for step, value in steps if step == "RUN"]
    assert any("apt-get install" in run and " make" in run for run in runs)
    assert [run for run in runs if "pip " in run or "uv " in run] == []  # all that make does not install comes from apt
    assert runs[-1].endswith("make .venv")
    made = next(number for number, (_, value) in enumerate(steps) if value.endswith("make .venv"))
    copied = " ".join(value for step, value in steps[:made] if step == "COPY")
    for needed in re.findall(r"^\$\(VENV\)/installed: (.*)$", (ROOT / "Makefile").read_text(), re.M)[0].split():
        assert needed in copied
    assert dict(steps)["USER"] != "root" and ["ENV", "RAY_AUTH_MODE=token"] in steps
    assert not any(SECRET.search(value) for step, value in steps if step in ("ENV", "ARG"))


# --- Secrets, and the page ---


@pytest.mark.parametrize("file", [*filter(Path.is_file, sorted(CLUSTER.iterdir())), ROOT / "docs" / "cluster.md"])
def test_no_file_holds_a_secret(file):
    assert not LITERAL.search(file.read_text())


def test_what_the_page_names_exists():
    page = (ROOT / "docs" / "cluster.md").read_text()
    for link in re.findall(r"\]\((?!https:)([^)#]+)\)", page):
        assert (ROOT / "docs" / link).exists(), link
    for name in set(re.findall(r"\b(?:cluster|jobs)/[\w-]+\.\w+", page)):
        assert (ROOT / name).exists(), name
    for script in ("cluster/local.py", "cluster/preflight.py"):
        command = [sys.executable, script, "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        for arguments in re.findall(rf"python {script}((?:\\\n|[^\n`])*)", page):
            for option in re.findall(r"(?<!\S)--[\w-]+", arguments):
                assert option in done.stdout, f"{script} has no {option}"
