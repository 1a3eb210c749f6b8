"""``pdspec chaos tls``: who has no business with a deployment is refused on every port, by certificates made here.

A whole deployment of the tiny model as processes, with mutual TLS, a cluster token and users' tokens. Members and users
get answers, over both handoffs; then callers of every wrong kind call the router, the workers and the relay.
"""

from __future__ import annotations

import dataclasses
import secrets
import socket
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from pdspec.client import Access, RouterClient
from pdspec.config import TlsConfig, WorkerConfig
from pdspec.study.certificates import Authority
from pdspec.study.stack import Stack
from pdspec.transfer.grpc_stream import METHOD
from pdspec.types import GenerateRequest, Route, SamplingParams, UserRequest
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.channels import make_client_channel
from pdspec.wire.codec import decode_request_to_pb
from pdspec.wire.trust import RELOAD_S, TokenFile, Trust, bearer

CALL_TIMEOUT_S = 5.0
REFUSED = ("UNAUTHENTICATED", "UNAVAILABLE")  # by the gate; by the handshake
TINY: dict[str, Any] = {
    "model": "tiny", "drafters": ("none", "ngram"), "drafter": "ngram", "cache_tokens": 4096, "threads": 1, "chunk": 64,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caller:
    """Somebody who calls: ``tls`` None is plain text."""

    name: str
    tls: TlsConfig | None
    token: str = ""


def run(
    *, progress: Callable[[str], object] = lambda text: None, worker: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The report; ``ok`` when every wrong caller was refused everywhere and every right one answered."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pdspec-tls-") as name:
        world = _World(Path(name))
        config = WorkerConfig.from_mapping(
            {**TINY, **(worker or {}), "tls": world.member, "cluster_token_file": str(world.files["cluster"])}
        )
        with Stack(config, router_changes={"token_file": str(world.files["user"])}, progress=progress) as stack:
            report = _report(stack, world, progress)
    return {**report, "seconds": round(time.monotonic() - began, 1)}


class _World:
    """Authorities, certificates and tokens of one run, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.cluster, self.users, self.stranger = (Authority(folder, who) for who in ("cluster", "users", "stranger"))
        self.files = {who: _token_file(folder, who) for who in ("cluster", "user")}
        self.tokens = {who: path.read_text().strip() for who, path in self.files.items()}
        self.member = self.cluster.tls(self.cluster.sign("member"), client_ca=self.users.ca)
        self.user = self.signed(self.users, "user")

    def signed(self, by: Authority, name: str, *, expired: bool = False) -> TlsConfig:
        """Of somebody who trusts the cluster's authority and shows a certificate of ``by``."""
        signed = by.sign(name, expired=expired)
        return TlsConfig(cert=signed.cert, key=signed.key, ca=self.cluster.ca)

    def callers(self) -> tuple[list[Caller], list[Caller]]:
        """Those who may not call the router, and those who may not call members."""
        token = self.tokens["user"]
        late, odd = self.signed(self.users, "late", expired=True), self.signed(self.stranger, "odd")
        outside = [
            Caller(name="plain text", tls=None, token=token),
            Caller(name="no certificate", tls=TlsConfig(ca=self.cluster.ca), token=token),
            Caller(name="expired certificate", tls=late, token=token),
            Caller(name="certificate of another authority", tls=odd, token=token),
            Caller(name="no token", tls=self.user),
            Caller(name="wrong token", tls=self.user, token=secrets.token_hex(32)),
        ]
        late_member = self.signed(self.cluster, "late", expired=True)
        inside = [
            *outside,
            Caller(name="user's certificate and token", tls=self.user, token=token),
            Caller(name="expired member", tls=late_member, token=self.tokens["cluster"]),
            Caller(name="member without token", tls=self.member),
            Caller(name="member with a user's token", tls=self.member, token=token),
        ]
        return outside, inside


def _report(stack: Stack, world: _World, progress: Callable[[str], object]) -> dict[str, Any]:
    places = _addresses(stack)
    pool = ThreadPoolExecutor(len(places))
    cut = {port: pool.submit(_silent, address) for port, address in places.items()}  # takes its time
    progress("asking as a user")
    token = world.tokens["user"]
    answers = {handoff: _ask(stack.endpoint, world.user, token, handoff) for handoff in ("direct", "relay")}
    progress("calling as others")
    outside, inside = world.callers()
    ports = _ports(stack)
    codes = {
        port: {caller.name: call(caller) for caller in (outside if port == "router" else inside)}
        for port, call in ports.items()
    }
    right = Caller(name="member", tls=world.member, token=world.tokens["cluster"])
    members = {port: call(right) for port, call in ports.items()}
    codes["router"]["old token"], fresh = _reload(stack.endpoint, world.user, world.files["user"])
    silent = {port: found.result() for port, found in cut.items()}
    pool.shutdown()
    answers["fresh token"] = _ask(stack.endpoint, world.user, fresh, "direct")
    logs = "".join(stack.log(name) for name in stack.processes)
    leaked = sorted(who for who, text in {**world.tokens, "fresh": fresh}.items() if text in logs)
    let_in = {port: [who for who, code in found.items() if code not in REFUSED] for port, found in codes.items()}
    same = len(set(answers.values())) == 1
    admitted = all(code not in REFUSED for code in members.values())
    return {
        "ok": not any(let_in.values()) and same and admitted and not leaked and all(silent.values()),
        "refused": codes,
        "let_in": let_in,
        "member": members,
        "answers_same": same,
        "silent_connections_cut": silent,
        "secrets_in_logs": leaked,
    }


def _token_file(folder: Path, name: str) -> Path:
    path = folder / name
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32) + "\n")
    return path


def _ask(endpoint: str, tls: TlsConfig, token: str, handoff: str) -> tuple[int, ...]:
    request = UserRequest(text="Hello", handoff=handoff, sampling=SamplingParams(max_tokens=16, ignore_eos=True))
    with RouterClient(endpoint, Access(tls=tls, token=token)) as client:
        return client.generate(request, timeout_s=30).token_ids


def _addresses(stack: Stack) -> dict[str, str]:
    inside = {role: addresses[0] for role, addresses in stack.addresses.items()}
    return {"router": stack.endpoint, **inside, "relay": stack.relay}


def _ports(stack: Stack) -> dict[str, Callable[[Caller], str]]:
    """Each port's most harmful call, as a function that returns its status code."""
    at = _addresses(stack)
    asked = GenerateRequest(request_id="x", prompt_ids=(1, 2, 3), sampling=SamplingParams(seed=1, max_tokens=2))
    decode = decode_request_to_pb(asked, Route(decode=at["decode"], prefill=()))
    user = pb.GenerateRequest(text="Hello", sampling=pb.SamplingParams(max_tokens=2))

    def prefill(channel: grpc.Channel, metadata: Any) -> None:
        method = channel.stream_stream(METHOD)
        list(method(iter([b"no frame"]), timeout=CALL_TIMEOUT_S, metadata=metadata))

    return {
        "router": lambda c: _code(at["router"], c, lambda channel, metadata: list(
            rpc.RouterStub(channel).Generate(user, timeout=CALL_TIMEOUT_S, metadata=metadata))),
        "decode": lambda c: _code(at["decode"], c, lambda channel, metadata: list(
            rpc.DecodeWorkerStub(channel).Decode(decode, timeout=CALL_TIMEOUT_S, metadata=metadata))),
        "prefill": lambda c: _code(at["prefill"], c, prefill),
        "relay": lambda c: _code(at["relay"], c, prefill),
    }  # fmt: skip


def _code(address: str, caller: Caller, call: Callable[[grpc.Channel, Any], Any]) -> str:
    channel = make_client_channel(address, Trust(tls=caller.tls or TlsConfig()))
    try:
        call(channel, bearer(caller.token))
    except grpc.RpcError as error:
        return error.code().name
    finally:
        channel.close()
    return "OK"


def _reload(endpoint: str, tls: TlsConfig, path: Path) -> tuple[str, str]:
    """Put a new token into the file while all runs: (code of the old one, the new one)."""
    old = TokenFile(str(path), field="token_file").first()
    fresh = secrets.token_hex(32)
    path.write_text(fresh + "\n")
    time.sleep(2 * RELOAD_S)
    user = pb.GenerateRequest(text="Hello", sampling=pb.SamplingParams(max_tokens=2))
    caller = Caller(name="old token", tls=tls, token=old)
    code = _code(endpoint, caller, lambda channel, metadata: list(
        rpc.RouterStub(channel).Generate(user, timeout=CALL_TIMEOUT_S, metadata=metadata)))  # fmt: skip
    return code, fresh


def _silent(address: str) -> bool:
    """Whether a connection that says nothing is closed by the other side."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as peer:
        peer.settimeout(15)
        try:
            return not peer.recv(1)
        except ConnectionError:
            return True
        except TimeoutError:
            return False
