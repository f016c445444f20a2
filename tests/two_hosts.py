"""Two hosts on one machine: network, host name and mount namespaces of their own, joined by a virtual cable.

They share the file system until a test mounts something on one of them. Needs a kernel that lets a user make
namespaces; `possible()` tells.
"""

import os
import signal
import subprocess
import sys
import time

PLUG_IN = """
set -e
ip link set lo up
hostname nodea
mount --bind "$1/hosts" /etc/hosts
unshare -num sh -c 'hostname nodeb; ip link set lo up; echo $$ > "$0/b.pid"; exec sleep 600' "$1" &
while [ ! -s "$1/b.pid" ]; do sleep 0.02; done
b=$(cat "$1/b.pid")
ip link add name plug0 type veth peer name plug1 netns "$b"
ip address add 10.77.0.1/24 dev plug0
ip link set plug0 up
nsenter -t "$b" -n sh -c 'ip address add 10.77.0.2/24 dev plug1; ip link set plug1 up'
echo $$ > "$1/a.pid"
wait
"""


class TwoHosts:
    """`nodea` (10.77.0.1) and `nodeb` (10.77.0.2), until `end()`."""

    def __init__(self, folder):
        self.pids = {}
        (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 nodea\n10.77.0.2 nodeb\n")
        command = ["unshare", "-rnmu", "--kill-child", "bash", "-c", PLUG_IN, "hosts", str(folder)]
        with (folder / "errors").open("w") as errors:
            self.process = subprocess.Popen(command, stderr=errors)
        deadline = time.monotonic() + 30
        while not (folder / "a.pid").exists() or not (folder / "a.pid").read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.end()
                raise OSError((folder / "errors").read_text())
            time.sleep(0.02)
        self.pids = {host: (folder / f"{host[-1]}.pid").read_text().strip() for host in ("nodea", "nodeb")}

    def start(self, host, command, **options):
        """Start a command on a host; its standard output and error are pipes of text."""
        enter = ["nsenter", "-t", self.pids[host], "-U", "-n", "-m", "-u", "--preserve-credentials", "--"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*enter, *map(str, command)], **pipes, **options)

    def do(self, host, *command):
        """Run a short command on a host."""
        done = self.start(host, command)
        out, err = done.communicate(timeout=30)
        assert done.returncode == 0, err
        return out

    def end(self):
        """Unplug: every process that this started for the hosts ends."""
        for pid in self.pids.values():
            os.kill(int(pid), signal.SIGKILL)
        self.process.kill()
        self.process.wait()


def possible(folder):
    """Whether this kernel lets us make them."""
    try:
        TwoHosts(folder).end()
    except (OSError, FileNotFoundError):
        return False
    return sys.platform == "linux"
