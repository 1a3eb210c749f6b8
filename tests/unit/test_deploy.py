"""The files under deploy/ are what Ray, KubeRay, Prometheus, Grafana and pdspec accept.

The KubeRay manifest is checked against KubeRay's own definition where PDSPEC_KUBERAY_CRD names it (in
ray-project/kuberay: helm-chart/kuberay-operator/crds/ray.io_rayclusters.yaml, too large to be kept here), and against
the shape written below otherwise; the test's name says which.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from test_metrics import names, sets

from pdspec.config import ClusterConfig

DEPLOY = Path(__file__).parents[2] / "deploy"
METRICS = DEPLOY.parent / "docs" / "metrics.md"
SETTINGS = ("pdspec.yaml", "pdspec-gpu.yaml", "pdspec-local.yaml")
CRD = os.environ.get("PDSPEC_KUBERAY_CRD", "")

_TEMPLATE = {
    "type": "object", "required": ["spec"],
    "properties": {"spec": {"type": "object", "required": ["containers"], "properties": {"containers": {
        "type": "array", "minItems": 1,
        "items": {"type": "object", "required": ["name", "image"]}}}}},
}  # fmt: skip
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_GROUP = {"rayStartParams": _TEXTS, "labels": _TEXTS, "template": _TEMPLATE}
_COUNT = {"type": "integer", "minimum": 0}
SHAPE = {
    "type": "object", "required": ["apiVersion", "kind", "metadata", "spec"], "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "ray.io/v1"}, "kind": {"const": "RayCluster"}, "metadata": {"type": "object"},
        "spec": {
            "type": "object", "required": ["headGroupSpec"], "additionalProperties": False,
            "properties": {
                "rayVersion": {"type": "string"},
                "authOptions": {"type": "object", "additionalProperties": False, "properties": {
                    "mode": {"enum": ["disabled", "token"]}, "secretName": {"type": "string"}}},
                "headGroupSpec": {"type": "object", "required": ["template"], "additionalProperties": False,
                                  "properties": _GROUP},
                "workerGroupSpecs": {"type": "array", "items": {
                    "type": "object", "required": ["groupName", "maxReplicas", "minReplicas", "template"],
                    "additionalProperties": False, "properties": {
                        **_GROUP, "groupName": {"type": "string"}, "replicas": _COUNT, "minReplicas": _COUNT,
                        "maxReplicas": _COUNT}}},
            },
        },
    },
}  # fmt: skip


def load(name: str) -> dict:
    return yaml.safe_load((DEPLOY / name).read_text())


def kuberay(kind: str) -> dict:
    (found,) = (part for part in yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text()) if part["kind"] == kind)
    return found


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster-local.yaml"])
def test_cluster_file_is_valid_for_ray(name):
    """By Ray's own ray-schema.json, its defaults filled in."""
    config = prepare_config(load(name))
    validate_config(config)
    assert config["head_start_ray_commands"] and config["worker_start_ray_commands"]
    config["available_node_typos"] = {}
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config)


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster-local.yaml"])
def test_every_member_shows_the_token(name):
    """Ray uses a token that lies in a file by itself only where it starts a cluster, not where it joins one."""
    config = load(name)
    assert "~/.ray/auth_token" in config["file_mounts"]
    for start in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in start[-1] and "RAY_worker_niceness=0" in start[-1]


@pytest.mark.parametrize(("name", "count"), [("pdspec.yaml", "min_workers"), ("pdspec-gpu.yaml", "max_workers")])
def test_node_types_hold_the_deployment(name, count):
    """Every worker finds a node with the labels that it asks for."""
    nodes = load("cluster.yaml")["available_node_types"].values()
    config = ClusterConfig.load(DEPLOY / name)
    for role, workers in (("prefill", config.prefill), ("decode", config.decode)):
        resources, labels = config.pinned(role)
        assert labels["pdspec-role"] == role and not resources
        fit = [node for node in nodes if labels.items() <= node["labels"].items()]
        assert sum(node.get(count, 0) for node in fit) >= workers
        if config.gpus_per_worker > 0:
            assert sum(node.get(count, 0) for node in fit if node["resources"].get("GPU")) >= workers


def test_machines_of_ones_own_hold_the_deployment():
    """Its start command gives the first worker machine one role and the others the other."""
    config, cluster = ClusterConfig.load(DEPLOY / "pdspec-local.yaml"), load("cluster-local.yaml")
    found = [role_of(cluster["worker_start_ray_commands"][-1], ip) for ip in cluster["provider"]["worker_ips"]]
    assert (found.count("prefill"), found.count("decode")) == (config.prefill, config.decode)


def role_of(command: str, address: str) -> str:
    shell = f'hostname() {{ echo "{address} "; }}; ray() {{ echo "$@"; }}; RAY_HEAD_IP=head; {command}'
    done = subprocess.run(["bash", "-euc", shell], capture_output=True, text=True, check=True)
    assert "--address=head:6379" in done.stdout
    return done.stdout.rpartition("pdspec-role=")[2].strip()


@pytest.mark.parametrize("name", [*SETTINGS, "one-box.yaml"])
def test_settings_load(name):
    config = ClusterConfig.load(DEPLOY / name)
    assert config.address == ("" if name == "one-box.yaml" else "auto")
    assert config.worker_config("prefill", 0).role == "prefill"


@pytest.mark.parametrize("by", ["KubeRay's definition"] if CRD else ["the shape kept here"])
def test_kuberay_manifest_is_valid(by):
    schema = definition(Path(CRD)) if CRD else SHAPE
    validator, cluster = jsonschema.Draft202012Validator(schema), kuberay("RayCluster")
    assert [error.message for error in validator.iter_errors(cluster)] == []
    broken = json.loads(json.dumps(cluster))
    broken["spec"]["headGroup"] = broken["spec"].pop("headGroupSpec")
    broken["spec"]["workerGroupSpecs"][0]["minReplicas"] = "1"
    assert len(list(validator.iter_errors(broken))) >= 3  # a name that is unknown, one that is missing, a wrong type


def definition(path: Path) -> dict:
    """The schema of v1 in KubeRay's definition; names that it does not know are refused, as the server's strict mode
    does."""
    versions = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    (schema,) = (version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    parts: list = [schema]
    for part in parts:
        parts.extend(inner for inner in (part.values() if isinstance(part, dict) else part)
                     if isinstance(inner, (dict, list)))  # fmt: skip
        if isinstance(part, dict) and part.get("x-kubernetes-int-or-string"):
            part.pop("type", None)
        fixed = isinstance(part, dict) and part.get("type") == "object" and isinstance(part.get("properties"), dict)
        if fixed and not part.get("x-kubernetes-preserve-unknown-fields"):
            part.setdefault("additionalProperties", False)
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def test_kuberay_manifest_fits_its_settings():
    """Groups have the labels and the number of pods that the settings in it ask for; probe, ports and token agree."""
    spec, config = kuberay("RayCluster")["spec"], yaml.safe_load(kuberay("ConfigMap")["data"]["pdspec.yaml"])
    settings = ClusterConfig.from_mapping(config)
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    for role, workers in (("prefill", settings.prefill), ("decode", settings.decode)):
        assert settings.pinned(role)[1].items() <= groups[role]["labels"].items()
        assert groups[role]["minReplicas"] == groups[role]["replicas"] == workers
    ray, pdspec = spec["headGroupSpec"]["template"]["spec"]["containers"]
    assert pdspec["readinessProbe"]["grpc"]["port"] == settings.router.port
    ports = {port["name"]: port["containerPort"] for port in ray["ports"]}
    assert ports["grpc"] == settings.router.port and ports["http"] == settings.http.port
    assert ports["relay-metrics"] == settings.router.metrics_port + 1
    for role, changed in (("prefill", settings.prefill_worker), ("decode", settings.decode_worker)):
        (worker,) = groups[role]["template"]["spec"]["containers"]
        assert worker["ports"] == [{"name": f"{role}-metrics", "containerPort": changed["metrics_port"]}]
    secret = {env["name"]: env for env in pdspec["env"]}["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert secret == {"name": spec["authOptions"]["secretName"], "key": "auth_token"}
    assert {port["targetPort"] for port in kuberay("Service")["spec"]["ports"]} <= set(ports)


@pytest.mark.parametrize("name", [*SETTINGS, "one-box.yaml"])
def test_prometheus_asks_where_metrics_are(name):
    (job,) = load("prometheus.yaml")["scrape_configs"]
    asked = {entry["labels"]["process"]: int(entry["targets"][0].rpartition(":")[2]) for entry in job["static_configs"]}
    config = ClusterConfig.load(DEPLOY / name)
    served = {
        "router": config.router.metrics_port, "relay": config.router.metrics_port + 1,
        "prefill": config.worker_config("prefill", 0).metrics_port,
        "decode": config.worker_config("decode", 0).metrics_port, "http": config.http.metrics_port,
    }  # fmt: skip
    assert {process: port for process, port in served.items() if port > 0}.items() <= asked.items()
    assert len(set(asked.values())) == len(asked) == 5


def test_dashboard_shows_metrics_that_exist():
    """Every name in a query is exported by some role, and every label is one of it or of prometheus.yaml."""
    rows = re.findall(r"^\| `(pdspec_\w+)` \| \w+ \| ([^|]*)\|", METRICS.read_text(), re.M)
    labels = {name: set(filter(None, re.split(r",\s*", row.strip()))) for name, row in rows}
    exported = set().union(*(names(metrics) for metrics in sets().values()))
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(queries) > 30
    for query in queries:
        used = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bpdspec_\w+", query)}
        assert used and used <= exported, query
        asked = set(re.findall(r"(\w+)=~?\"", query))
        asked |= {label.strip() for found in re.findall(r"by \(([^)]*)\)", query) for label in found.split(",")}
        assert asked <= {"le", "process", "instance"}.union(*(labels[name] for name in used)), query
    shown = set(re.findall(r"\bpdspec_\w+", " ".join(queries)))
    assert {"pdspec_time_to_first_token_seconds_bucket", "pdspec_spec_decode_goodput_per_verified_row"} <= shown


def test_image_copies_what_is_there():
    text = (DEPLOY / "Dockerfile").read_text()
    copied = [source for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for source in line.split()]
    assert copied and all((DEPLOY.parent / source).exists() for source in copied)
    packages = {path.parent.name for path in DEPLOY.parent.glob("*/__init__.py")} - {"tests"}
    assert packages <= set(copied)
    assert {"TORCH", "TORCH_INDEX"} <= set(re.findall(r"^ARG (\w+)", text, re.M))


@pytest.mark.parametrize("script", ["one-box.sh"])
def test_script_parses(script):
    assert os.access(DEPLOY / script, os.X_OK)
    subprocess.run(["sh", "-n", str(DEPLOY / script)], check=True)
