"""Tokens and certificates: what is let through, what is refused and why, and that secrets stay where they are."""

from __future__ import annotations

import asyncio
import json
import os

import grpc
import pytest

from pdspec.client import Access
from pdspec.config import ClusterConfig, RouterConfig, TlsConfig, WorkerConfig
from pdspec.errors import ConfigError, InvalidRequest, Overloaded, Unauthenticated
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire import trust as subject
from pdspec.wire.channels import bind, make_channel, make_server
from pdspec.wire.gate import Gate
from pdspec.wire.status import from_rpc_error
from pdspec.wire.trust import TokenFile, Trust, bearer

GOOD, OTHER, NEW = "a" * 32, "b" * 32, "c" * 32
GENERATE, HEALTH = "/pdspec.v1.Router/Generate", "/grpc.health.v1.Health/Check"


@pytest.fixture
def tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "RELOAD_S", 0.0)
    path = tmp_path / "tokens"
    path.write_text(f"# users\n{GOOD}  # alice\n\n{OTHER}\n")
    return path


def test_tokens_are_read_again_and_a_broken_file_changes_nothing(tokens):
    file = TokenFile(str(tokens), field="token_file")
    assert file.first() == GOOD and file.holds(OTHER) and not file.holds(NEW) and not file.holds("")
    tokens.write_text(f"{NEW}\n")
    assert file.holds(NEW) and not file.holds(GOOD)
    tokens.write_text("short\n")
    assert file.holds(NEW)
    os.unlink(tokens)
    assert file.holds(NEW)
    tokens.write_text(f"{GOOD}\n")
    assert file.holds(GOOD) and not file.holds(NEW)


@pytest.mark.parametrize("text", ["", "# none\n", "tiny!\n", "ü" * 20, "two words of a token"])
def test_a_token_file_that_cannot_be_meant_is_refused(tmp_path, text):
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        TokenFile(str(path), field="token_file")
    assert caught.value.field == "token_file" and "openssl rand" in caught.value.remedy
    assert text.strip() not in str(caught.value) or not text.strip()


def test_users_and_members(tokens, tmp_path):
    cluster = tmp_path / "cluster"
    cluster.write_text(f"{NEW}\n")
    trust = Trust.of(RouterConfig(token_file=str(tokens), cluster_token_file=str(cluster)))
    for token in (GOOD, OTHER, NEW):
        trust.check(GENERATE, bearer(token), members=False)
    trust.check(GENERATE, bearer(NEW), members=True)
    trust.check(HEALTH, (), members=True)
    for metadata in ((), bearer("d" * 32), (("authorization", GOOD),), (("authorization", f"Basic {GOOD}"),)):
        with pytest.raises(Unauthenticated) as caught:
            trust.check(GENERATE, metadata, members=False)
        assert "--token-file" in caught.value.remedy and "d" * 32 not in str(caught.value)
    with pytest.raises(Unauthenticated, match="members of the cluster"):
        trust.check(GENERATE, bearer(GOOD), members=True)
    inside = Trust.of(RouterConfig(cluster_token_file=str(cluster)))
    inside.check(GENERATE, (), members=False)  # users are asked for nothing


def test_certificates_belong_together():
    for values, field in (
        ({"cert": "x"}, "tls.key"), ({"key": "x"}, "tls.cert"), ({"client_ca": "x"}, "tls.cert"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            TlsConfig.from_mapping(values)
        assert caught.value.field == field
    for kind in (WorkerConfig, RouterConfig):
        with pytest.raises(ConfigError, match=r"tls\.ca"):
            kind(tls=TlsConfig(cert="x", key="y"))
        with pytest.raises(ConfigError, match="cannot read"):
            Trust.of(kind(tls=TlsConfig(cert="/no/x", key="/no/y", ca="/no/z")))


def test_flags_and_the_whole_cluster(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--tls-cert", "c.pem", "--tls-key", "k.pem", "--tls-ca", "a.pem", "--cluster-token-file", "t"]
    worker = WorkerConfig.from_args(flags, prog="test")
    assert worker.tls == TlsConfig(cert=f"{tmp_path}/c.pem", key=f"{tmp_path}/k.pem", ca=f"{tmp_path}/a.pem")
    own = {"cert": "r.pem", "key": "r.key", "ca": "a.pem", "client_ca": "u.pem"}
    cluster = ClusterConfig.from_mapping(
        {"tls": worker.tls.to_mapping(), "cluster_token_file": "t", "router": {"tls": own, "token_file": "users"}}
    )
    assert cluster.worker_config("decode", 0).tls == worker.tls
    assert cluster.worker_config("prefill", 0).cluster_token_file == str(tmp_path / "t")
    router = cluster.router_config()
    assert router.tls.client_ca == str(tmp_path / "u.pem") and router.cluster_token_file == str(tmp_path / "t")
    assert ClusterConfig.from_mapping(json.loads(json.dumps(cluster.to_mapping()))) == cluster


def test_secrets_are_in_no_dump(tokens):
    config = RouterConfig(token_file=str(tokens), cluster_token_file=str(tokens))
    trust = Trust.of(config)
    shown = [config, trust, Access(token=GOOD), vars(Gate(trust))]
    dumps = [json.dumps(config.to_mapping()), *map(repr, shown)]
    assert not any(token in dump for token in (GOOD, OTHER) for dump in dumps)


class _Context:
    def __init__(self, token: str = "", peer: str = "ipv4:10.0.0.1:999") -> None:
        self._token, self._peer = token, peer

    def invocation_metadata(self):
        return bearer(self._token)

    def peer(self) -> str:
        return self._peer


def test_one_user_calls_too_often_and_others_do_not_notice():
    gate = Gate(rate=2.0, members=False)
    for _ in range(4):
        gate.enter(GENERATE, _Context())
    with pytest.raises(Overloaded) as caught:
        gate.enter(GENERATE, _Context(peer="ipv4:10.0.0.1:1000"))
    assert 0 < caught.value.retry_after_ms <= 501 and caught.value.field == "client_rate"
    gate.enter(GENERATE, _Context(GOOD))
    gate.enter(GENERATE, _Context(peer="ipv4:10.0.0.2:999"))
    gate.enter(HEALTH, _Context())


class _Status(rpc.WorkerServicer):
    async def Status(self, request, context):
        return pb.WorkerStatus(worker_id="it")


def test_a_call_that_sends_no_request_is_cut():
    async def scenario() -> None:
        server = make_server(gate=Gate(request_timeout_s=0.2))
        rpc.add_WorkerServicer_to_server(_Status(), server)
        channel = make_channel(bind(server, "127.0.0.1", 0))
        await server.start()
        try:
            call = channel.stream_unary("/pdspec.v1.Worker/Status")()
            with pytest.raises(grpc.RpcError) as caught:
                await asyncio.wait_for(call, 5)
            error = from_rpc_error(caught.value)
            assert isinstance(error, InvalidRequest) and "no whole request after 0.2 s" in str(error)
            empty = channel.stream_unary("/pdspec.v1.Worker/Status")(iter(()))
            with pytest.raises(grpc.RpcError, match="ended without one"):
                await asyncio.wait_for(empty, 5)
            assert (await rpc.WorkerStub(channel).Status(pb.StatusRequest())).worker_id == "it"
        finally:
            await channel.close()
            await server.stop(0)

    asyncio.run(scenario())
