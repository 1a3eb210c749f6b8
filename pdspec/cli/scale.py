"""``pdspec drain`` and ``pdspec scale``: workers leave, and change their roles, without a request being lost."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from pdspec.cli.options import DEFAULT_ENDPOINT, Endpoint, Json, TlsCa, TlsCert, TlsKey, TokenFlag, access
from pdspec.cli.output import notes, only_json, print_json
from pdspec.client import RouterClient
from pdspec.config import ROLES, TlsConfig
from pdspec.errors import InvalidRequest, PeerLost, UnknownName
from pdspec.wire.doors import ask_to_drain
from pdspec.wire.trust import TokenFile, Trust
from router.advice import Goals, Move, acceptance, advise, decode_load, prefill_load

POLICIES = ("advise", "switch")
LOOK_S = 0.2
ClusterToken = Annotated[
    str, typer.Option("--cluster-token-file", help="Workers obey members of the cluster alone: its token.")
]


def drain(
    worker: Annotated[str, typer.Argument(help="Its id or address; see `pdspec top`.")],
    role: Annotated[str, typer.Option(help="prefill or decode: what it then does; else its process ends.")] = "",
    deadline_s: Annotated[float, typer.Option(help="That calls may take to end there (-1: its drain_s).")] = -1.0,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    token_file: TokenFlag = "",
    cluster_token_file: ClusterToken = "",
    timeout_s: Annotated[float, typer.Option(help="To wait for it.")] = 600.0,
) -> None:
    """A worker takes nothing new and finishes what it has; under Ray it is then started anew.

    Answers that take longer than --deadline-s go on with another worker."""
    if role not in ("", *ROLES):
        raise InvalidRequest(f"no role {role!r}", field="--role", remedy="prefill or decode")
    shown = access(tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, token_file=token_file)
    member = _member(tls_ca, tls_cert, tls_key, cluster_token_file)
    with RouterClient(endpoint, shown) as client:
        found = _find(client, worker)
        ask_to_drain(found["address"], role, None if deadline_s < 0 else deadline_s, member)
        notes().print(f"{found['worker_id']} drains")
        seconds = _await(client, found, role, timeout_s)
    print(f"{found['worker_id']} {'serves ' + role if role else 'drained'} after {seconds:.1f} s")


def scale(
    policy: Annotated[str, typer.Option(help="advise: say it; switch: do it.")] = "advise",
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 5.0,
    patience: Annotated[int, typer.Option(min=1, help="Looks in a row that must say the same.")] = 3,
    cooldown_s: Annotated[float, typer.Option(min=0, help="After a switch.")] = 60.0,
    ttft: Annotated[float, typer.Option(min=0.001, help="Seconds that a request may wait to begin.")] = 1.0,
    tpot: Annotated[float, typer.Option(min=0.0001, help="Seconds of an output token.")] = 0.1,
    once: Annotated[bool, typer.Option("--once", help="Look twice, say what is seen, and end.")] = False,
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    token_file: TokenFlag = "",
    cluster_token_file: ClusterToken = "",
    json: Json = False,
) -> None:
    """Watch waits and speeds of both roles, and advise or make a worker change its role. Ends with Ctrl-C."""
    if policy not in POLICIES:
        raise InvalidRequest(f"no policy {policy!r}", field="--policy", remedy=" or ".join(POLICIES))
    if json and not once:
        raise InvalidRequest("a loop is no object", field="--json", remedy="add --once")
    shown = access(tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, token_file=token_file)
    member, goals = _member(tls_ca, tls_cert, tls_key, cluster_token_file), Goals(ttft_s=ttft, tpot_s=tpot)
    with RouterClient(endpoint, shown) as client:
        looks = Looks(client, goals)
        if once:
            with only_json(json):
                looks.look()
                time.sleep(interval)
                seen = looks.look()
            print_json(seen) if json else print(_said(seen))
            return
        try:
            _watch(looks, client, policy == "switch", interval, patience, cooldown_s, member)
        except KeyboardInterrupt:
            return


class Looks:
    """Asks the router; acceptance is that between two looks, or the last that was seen."""

    def __init__(self, client: RouterClient, goals: Goals) -> None:
        self._client, self._goals = client, goals
        self._before: list[dict[str, Any]] = []
        self._acceptance = 0.0
        self.move: Move | None = None

    def look(self) -> dict[str, Any]:
        """Both loads and the advice."""
        workers, requests = self._client.workers(), self._client.requests()
        self._acceptance = acceptance(workers, self._before) or self._acceptance
        self._before = workers
        prefill = prefill_load(workers, self._goals)
        decode = decode_load(workers, requests, self._goals, acceptance_length=self._acceptance)
        self.move = advise(prefill, decode, self._goals)
        move = asdict(self.move) if self.move else None
        return {"prefill": asdict(prefill), "decode": asdict(decode), "requests": len(requests), "advice": move}


def _watch(
    looks: Looks, client: RouterClient, do: bool, interval: float, patience: int, cooldown_s: float, member: Trust
) -> None:
    said, same, rest = "", 0, 0.0
    while True:
        seen = looks.look()
        notes().print(_said(seen))
        move = looks.move
        same = same + 1 if move and move.role == said else int(move is not None)
        said = move.role if move else ""
        if move and same >= patience and time.monotonic() >= rest:
            found = _find(client, move.address)
            print(f"{found['worker_id']} to {move.role}: {move.why}", flush=True)
            if do:
                ask_to_drain(move.address, move.role, None, member)
                print(f"{found['worker_id']} serves {move.role} after {_await(client, found, move.role, 600.0):.1f} s",
                      flush=True)
            rest, same = time.monotonic() + cooldown_s, 0
        time.sleep(interval)


def _said(seen: dict[str, Any]) -> str:
    parts = [f"{role} {len(seen[role]['workers'])} workers, pressure {seen[role]['pressure']:.2f}" for role in ROLES]
    return "; ".join([*parts, f"advice: {seen['advice']['why'] if seen['advice'] else 'none'}"])


def _find(client: RouterClient, name: str) -> dict[str, Any]:
    """Raises UnknownName."""
    every = client.workers()
    for entry in every:
        if name in (entry["worker_id"], entry["address"]):
            return entry
    known = ", ".join(entry["worker_id"] or entry["address"] for entry in every)
    raise UnknownName(f"no worker {name!r}", field="worker", remedy=f"there are {known or 'none'}")


def _await(client: RouterClient, worker: dict[str, Any], role: str, timeout_s: float) -> float:
    """Seconds until it serves ``role``, or has left. Raises PeerLost."""
    began = time.monotonic()
    while time.monotonic() - began < timeout_s:
        states = {entry["address"]: entry for entry in client.workers()}
        found = states.get(worker["address"])
        state = found["state"] if found else "gone"
        if (state == "ready" and found and found["role"] == role) if role else state in ("lost", "gone"):
            return time.monotonic() - began
        time.sleep(LOOK_S)
    raise PeerLost(f"{worker['worker_id']} still drains after {timeout_s:g} s", remedy="see its log")


def _member(ca: str, cert: str, key: str, token_file: str) -> Trust:
    cluster = TokenFile(token_file, field="--cluster-token-file") if token_file else None
    return Trust(tls=TlsConfig(ca=ca, cert=cert, key=key), cluster=cluster)
