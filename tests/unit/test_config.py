"""Config files and flags: what is wrong is refused by name, with the remedy."""

from __future__ import annotations

import dataclasses

import pytest

from pdspec.config import ClusterConfig, RouterConfig, WorkerConfig
from pdspec.errors import ConfigError


def test_yaml_then_flags(tmp_path):
    path = tmp_path / "worker.yaml"
    path.write_text("model: tiny\nchunk: 64\ndrafters: [none, ngram]\ndrafter: ngram\nheads: {ngram: /x}\n")
    config = WorkerConfig.from_args(["--config", str(path), "--chunk", "128", "--poison"], prog="test")
    assert (config.model, config.chunk, config.drafters) == ("tiny", 128, ("none", "ngram"))
    assert config.poison and config.heads == {"ngram": "/x"}


def test_toml(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text('decode = 3\n[worker]\nmodel = "tiny"\n[decode_worker]\nmax_batch = 7\n[router]\nport = 0\n')
    config = ClusterConfig.load(path)
    assert config.decode == 3 and config.router.port == 0
    worker = config.worker_config("decode", 2)
    assert (worker.model, worker.max_batch, worker.worker_id, worker.role) == ("tiny", 7, "decode-2", "decode")
    assert config.worker_config("prefill", 0).max_batch == WorkerConfig().max_batch
    assert config.router_config().model == "tiny"


@pytest.mark.parametrize(
    ("values", "field", "remedy"),
    [
        ({"modle": "tiny"}, "modle", "did you mean 'model'?"),
        ({"worker": {"port": 1}}, "worker", "did you mean 'worker_id'?"),
        ({"dtype": "float16"}, "dtype", "did you mean 'bfloat16'?"),
        ({"port": 70000}, "port", "at most 65535"),
        ({"port": True}, "port", "type int"),
        ({"chunk": 1.5}, "chunk", "type int"),
        ({"chunk": "many"}, "chunk", "type int"),
        ({"poison": "perhaps"}, "poison", "type bool"),
        ({"model": 3}, "model", "type str"),
        ({"drafter": "eagle"}, "drafter", "did you mean 'eagle3'?"),
        ({"heads": {"medusa": "x"}}, "heads", "known: none, ngram, suffix, eagle3"),
        ({"device": "tpu"}, "device", "cuda:N"),
        ({"stall_timeout_s": float("nan")}, "stall_timeout_s", "at least"),
    ],
)
def test_refusals_of_a_worker(values, field, remedy):
    with pytest.raises(ConfigError) as caught:
        WorkerConfig.from_mapping(values)
    assert caught.value.field == field
    assert remedy in caught.value.remedy


def test_unknown_key_in_a_section():
    with pytest.raises(ConfigError, match="unknown key 'prot' of WorkerConfig .did you mean 'port'"):
        ClusterConfig.from_mapping({"worker": {"prot": 1}})
    with pytest.raises(ConfigError, match="no mapping"):
        ClusterConfig.from_mapping({"router": 3})
    with pytest.raises(ConfigError, match="unknown key 'max_bach'"):
        ClusterConfig.from_mapping({"decode_worker": {"max_bach": 1}}).worker_config("decode", 0)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "\x00"])
def test_files_that_hold_no_settings(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        RouterConfig.load(path)
    assert str(path) in str(caught.value) and caught.value.remedy


def test_missing_file():
    with pytest.raises(ConfigError, match="cannot read"):
        RouterConfig.load("/nowhere/at/all.yaml")


def test_frozen_and_whole_round_trip():
    config = ClusterConfig.from_mapping({"prefill": 2, "prefill_resources": {"prefill": 1}})
    assert ClusterConfig.from_mapping(config.to_mapping()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.prefill = 3  # type: ignore[misc]


def test_pages_from_tokens():
    assert WorkerConfig(cache_tokens=100, page_size=16).pages() == 7
    assert WorkerConfig(num_pages=5).pages() == 5
