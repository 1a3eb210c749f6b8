#!/usr/bin/env python3
"""deploy/down-local.py FILE: end what `ray up FILE` started on machines of your own, and remove what it wrote there.

`ray down` alone stops Ray on the head: the others notice within a minute, and logs, settings and the ssh key stay. Here
`pdspec down` and `ray down` are followed by a `ray stop` on every machine of FILE, which ends every Ray there. Kept are
pdspec's cache of models and kernels, and the token of the machine that this runs on. Needs `ray` on the PATH.
"""

from __future__ import annotations

import getpass
import hashlib
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

TEMPORARY = Path(tempfile.gettempdir())
LEFT = """
exec 2>&1
source ~/.bashrc
ray stop || exit 1
rm -rf /tmp/ray/session_* /tmp/pymp-*
rm -f /tmp/ray/ray_current_cluster /tmp/ray/prom_metrics_service_discovery.json /tmp/ray/cluster-{name}.*
rm -f ~/ray_bootstrap_config.yaml ~/ray_bootstrap_key.pem
[ "$(hostname -I)" = {mine} ] || rm -f ~/.ray/auth_token
rmdir /tmp/ray ~/.ray 2> /dev/null
true
"""


def main(file: str) -> int:
    """The exit status: 1 when a machine could not be reached."""
    config = yaml.safe_load(Path(file).read_text())
    provider, auth, name = config["provider"], config["auth"], config["cluster_name"]
    if provider["type"] != "local":
        print("this is for `type: local`; elsewhere `ray down` ends the machines", file=sys.stderr)
        return 2
    subprocess.run(["ray", "exec", file, "pdspec down"], check=False)  # what it says is shown; nothing may run there
    subprocess.run(["ray", "down", "-y", file], check=False)
    mine = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.strip()
    script = LEFT.format(name=shlex.quote(name), mine=shlex.quote(mine))
    lost = [host for host in [provider["head_ip"], *provider["worker_ips"]] if not _run(host, auth, script)]
    _forget(name)
    for host in lost:
        print(f"{host}: not cleaned", file=sys.stderr)
    return 1 if lost else 0


def _run(host: str, auth: dict, script: str) -> bool:
    key = auth.get("ssh_private_key")
    proxy = auth.get("ssh_proxy_command")
    options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "ConnectTimeout=10"]
    options += [f"ProxyCommand={proxy}"] if proxy else []
    command = ["ssh", *(["-i", str(Path(key).expanduser())] if key else []), *(f"-o{option}" for option in options)]
    shell = f"bash --login -i -c {shlex.quote(script)} 2> /dev/null"  # as Ray calls it; without a terminal -i complains
    done = subprocess.run([*command, f"{auth['ssh_user']}@{host}", shell], check=False, stdin=subprocess.DEVNULL)
    return done.returncode == 0


def _forget(name: str) -> None:
    """Remove what Ray keeps of the cluster on this machine: its state, its cached settings and shared connections."""
    for path in (TEMPORARY / "ray").glob(f"cluster-{name}.*"):
        path.unlink()
    for path in TEMPORARY.glob("ray-config-*"):
        if f'"cluster_name": "{name}"' in path.read_text(errors="replace"):
            path.unlink()
    user, cluster = (hashlib.sha256(text.encode()).hexdigest()[:10] for text in (getpass.getuser(), name))
    sockets = TEMPORARY / f"ray_ssh_{user}" / cluster
    for path in sockets.glob("*"):
        subprocess.run(["ssh", "-o", f"ControlPath={path}", "-O", "exit", "any"], check=False, capture_output=True)
    shutil.rmtree(sockets, ignore_errors=True)
    for folder in (sockets.parent, TEMPORARY / "ray"):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
