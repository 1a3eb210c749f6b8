"""Machines in one box, made of Linux namespaces: each has its own processes, network address, /tmp, /dev/shm, home
folder and sshd on port 22, so that `ray stop` ends the Rays of its machine alone, and what is left can be counted.

    lab ── bridge 10.77.0.1 ──┬── head    10.77.0.11      killing a machine ends all its processes and its link at once
    (`ray up` runs here)      └── worker  10.77.0.12      files of the real machine are seen, under the same paths

Needs root, and the programs of util-linux, iproute2 and openssh-server.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
HOME = "/run/home"  # of every machine; a place in memory
BRIDGE = "10.77.0.1"
NEEDED = {"sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "rsync": "rsync",
          "ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux"}  # fmt: skip
SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
START_S = 20.0

# What hides behind the new /tmp and /run is laid over them again where the tests or Python need it.
_SETUP = r"""
set -eu
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /mnt
for path in $KEPT; do mkdir -p "/mnt$path"; mount --bind "$path" "/mnt$path"; done
for folder in /tmp /run /dev/shm; do mount -t tmpfs -o mode=1777 tmpfs $folder; done
for path in $KEPT; do [ -e "$path" ] || { mkdir -p "$path"; mount --bind "/mnt$path" "$path"; }; done
mkdir -p /run/sshd "$HOME/.ssh" "$HOME/pdspec"
chmod 755 /run/sshd
sed "s#^root:.*#root:x:0:0:root:$HOME:/bin/bash#" /etc/passwd > /run/passwd
mount --bind /run/passwd /etc/passwd
printf '%s\n' "$PUBLIC_KEY" > "$HOME/.ssh/authorized_keys"
(umask 077; printf '%s\n' "$PRIVATE_KEY" > "$HOME/.ssh/key")
for path in "$REPOSITORY"/*; do ln -s "$path" "$HOME/pdspec/"; done
ln -s "$PREFIX" "$HOME/pdspec/.venv"
printf 'export PATH=~/pdspec/.venv/bin:$PATH PYTHONPATH=%s\n' "$REPOSITORY" > "$HOME/.bashrc"
ssh-keygen -q -t ed25519 -N '' -f /run/host_key
cd "$HOME"
unset PUBLIC_KEY PRIVATE_KEY
exec "$SSHD" -D -e -f /dev/null -h /run/host_key -o PidFile=none -o UsePAM=no -o StrictModes=no \
    -o PermitRootLogin=yes -o PasswordAuthentication=no
"""


def missing() -> str:
    """Why machines cannot be made here, empty when they can."""
    packages = {package for name, package in NEEDED.items() if not shutil.which(name, path=SEARCHED)}
    if packages:
        return "install " + " ".join(sorted(packages))
    return "" if os.geteuid() == 0 else "run as root: machines are network and process namespaces"


class Machine:
    """One machine. ``address`` is its IP."""

    def __init__(self, name: str, address: str, environment: dict[str, str]) -> None:
        self.name, self.address, self._environment = name, address, environment
        self._lab: Machine | None = None
        self.start()

    def start(self) -> None:
        """Boot; nothing is left of what it held before. Returns when its sshd listens."""
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child",
             "sh", "-c", _SETUP],
            env=self._environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.init = _child(self._process)

    def link(self, lab: Machine) -> None:
        """Plug it into the bridge of ``lab``."""
        self._lab, port = lab, f"to-{self.name}"
        lab.ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(self.init))
        lab.ip("link", "set", port, "master", "bridge", "up")
        self.ip("link", "set", "lo", "up")
        self.ip("addr", "add", f"{self.address}/24", "dev", "eth0")
        self.ip("link", "set", "eth0", "up")
        self.ip("route", "add", "default", "via", BRIDGE)  # Ray finds its own address by it

    def ip(self, *argv: str) -> None:
        """``ip`` in the machine's network."""
        subprocess.run(["nsenter", "-t", str(self.init), "-n", "ip", *argv], check=True, env={"PATH": SEARCHED})

    def run(self, *argv: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """A command on the machine, without ssh, as its user would type it in a fresh shell."""
        command = self.command(*argv)
        return subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=timeout)

    def command(self, *argv: str) -> list[str]:
        """``argv``, to be run on the machine with ``environment``."""
        return ["nsenter", "-t", str(self.init), "--net", "--mount", "--pid", f"--wdns={HOME}", *argv]

    def environment(self) -> dict[str, str]:
        """Of a fresh shell there."""
        path = f"{Path(sys.executable).parent}:{SEARCHED}"
        return {"PATH": path, "HOME": HOME, "LANG": "C.UTF-8", "TERM": "dumb", "PYTHONPATH": str(REPOSITORY)}

    def processes(self) -> dict[int, str]:
        """Command lines of all processes but the machine's sshd, by id in this process's own numbering."""
        found = {}
        here = os.readlink(f"/proc/{self.init}/ns/pid")
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                if os.readlink(folder / "ns" / "pid") == here and int(folder.name) != self.init:
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return {pid: command for pid, command in found.items() if command and not command.startswith("sshd: ")}

    def ports(self) -> set[int]:
        """TCP ports that somebody listens on, sshd's apart."""
        lines = [line.split() for table in ("tcp", "tcp6")
                 for line in Path(f"/proc/{self.init}/net/{table}").read_text().splitlines()[1:]]  # fmt: skip
        return {int(line[1].rpartition(":")[2], 16) for line in lines if line[3] == "0A"} - {22}

    def files(self, *folders: str) -> set[str]:
        """Files, links and sockets below ``folders`` of the machine."""
        root = Path(f"/proc/{self.init}/root")
        found = (path for folder in folders for path in (root / folder.lstrip("/")).rglob("*"))
        return {"/" + str(path.relative_to(root)) for path in found if path.is_symlink() or not path.is_dir()}

    def kill(self) -> None:
        """Pull the plugs: no packet leaves it any more, and then every process ends."""
        if self._lab:
            self._lab.ip("link", "del", f"to-{self.name}")
            self._lab = None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)
        self._process.wait(30)
        self._process.stderr.close()


@contextlib.contextmanager
def machines(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Machine]]:
    """The machine ``lab``, and others of ``names`` on its bridge, at 10.77.0.11 and up. ``folder`` takes the keys."""
    environment = _environment(folder)
    made: dict[str, Machine] = {}
    try:
        lab = made["lab"] = Machine("lab", BRIDGE, environment)
        lab.ip("link", "set", "lo", "up")
        lab.ip("link", "add", "bridge", "type", "bridge", "forward_delay", "0")
        lab.ip("addr", "add", f"{BRIDGE}/24", "dev", "bridge")
        lab.ip("link", "set", "bridge", "up")
        for index, name in enumerate(names):
            made[name] = Machine(name, f"10.77.0.{11 + index}", environment)
            made[name].link(lab)
        yield made
    finally:
        for machine in reversed(made.values()):
            machine.kill()


def _environment(folder: Path) -> dict[str, str]:
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    kept = {str(REPOSITORY), sys.prefix, sys.base_prefix}
    return {
        "PATH": SEARCHED, "HOME": HOME, "REPOSITORY": str(REPOSITORY), "PREFIX": sys.prefix,
        "KEPT": " ".join(sorted(path for path in kept if path not in ("/", "/usr"))),
        "SSHD": shutil.which("sshd", path=SEARCHED) or "",
        "PUBLIC_KEY": key.with_suffix(".pub").read_text().strip(), "PRIVATE_KEY": key.read_text().strip(),
    }  # fmt: skip


def _child(process: subprocess.Popen) -> int:
    """The first process of the new namespace, once its sshd listens."""
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, IndexError):
            init = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
            if Path(f"/proc/{init}/comm").read_text().strip() == "sshd":
                return init
        time.sleep(0.05)
    process.kill()
    raise RuntimeError(f"a machine did not start: {process.communicate()[1].decode()}")
