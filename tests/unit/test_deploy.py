"""The files under deploy/ are what Ray and pdspec accept."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pdspec.config import ClusterConfig

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster-local.yaml"])
def test_cluster_file_is_valid_for_ray(name):
    config = prepare_config(yaml.safe_load((DEPLOY / name).read_text()))
    validate_config(config)
    assert config["head_start_ray_commands"] and config["worker_start_ray_commands"]


def test_node_types_hold_the_deployment():
    """Every worker of pdspec.yaml finds a node with the resource that it asks for."""
    nodes = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())["available_node_types"]
    config = ClusterConfig.load(DEPLOY / "pdspec.yaml")
    for count, wanted in ((config.prefill, config.prefill_resources), (config.decode, config.decode_resources)):
        for resource, amount in wanted.items():
            held = sum(node.get("min_workers", 0) * node["resources"].get(resource, 0) for node in nodes.values())
            assert held >= count * amount


@pytest.mark.parametrize("name", ["pdspec.yaml", "pdspec-local.yaml"])
def test_settings_load(name):
    config = ClusterConfig.load(DEPLOY / name)
    assert config.address == "auto"
    assert config.worker_config("prefill", 0).role == "prefill"
