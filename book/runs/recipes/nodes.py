"""Several nodes on one machine: network namespaces of Linux, joined by a bridge.

A node has a network interface, an address, a host name and a process table of its own.
Its processes reach the other nodes through `eth0` only, so a job that runs on nodes has
done what it must do on a cluster: find an address, an interface and a free port. The
namespaces belong to one process and vanish with it. Root is not needed where users may
make namespaces. Elsewhere all nodes are the loopback, and `isolated` is False.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess

import psutil

_TOOLS = ("unshare", "nsenter", "setpriv", "ip", "mount", "hostname")
_NETWORK = """
set -e
mount -t tmpfs none /run
mkdir /run/netns
ip link add bridge type bridge
ip link set bridge up
echo "127.0.0.1 localhost" > /run/hosts
for i in $(seq 0 $(($1 - 1))); do
  ip netns add node$i
  ip link add port$i type veth peer name eth0 netns node$i
  ip link set port$i master bridge up
  ip -n node$i address add 10.77.0.$((i + 1))/24 dev eth0
  ip -n node$i link set eth0 up
  ip -n node$i link set lo up
  echo "10.77.0.$((i + 1)) node$i" >> /run/hosts
done
mount --bind /run/hosts /etc/hosts
echo ready
exec cat
"""


class Nodes:
    """Nodes of a small cluster, for the time of a `with` block.

    Args:
        num_nodes: How many, up to 250.
        isolated: False takes the loopback even where namespaces are allowed.

    Attributes:
        hosts: The name of each node, which every node can resolve.
        isolated: Whether each node is a network namespace.
        reason: Why not, in a line.
    """

    def __init__(self, num_nodes: int, *, isolated: bool = True) -> None:
        self._running: list[list[subprocess.Popen]] = [[] for _ in range(num_nodes)]
        self._network: subprocess.Popen | None = None
        self.isolated, self.reason = isolated, "" if isolated else "not asked for"
        if isolated:
            self._open(num_nodes)
        names = [f"node{i}" for i in range(num_nodes)]
        self.hosts = names if self.isolated else ["localhost"] * num_nodes

    def _open(self, num_nodes: int) -> None:
        missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
        if missing:
            self.isolated, self.reason = False, f"{', '.join(missing)} not installed"
            return
        owner = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
        self._network = subprocess.Popen(
            [*owner, "sh", "-c", _NETWORK, "sh", str(num_nodes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._network.stdout is not None
        assert self._network.stderr is not None
        opened = self._network.stdout.readline() == "ready\n"
        if opened:
            tried = self.start(0, ["true"], stderr=subprocess.PIPE, text=True)
            refusal = tried.communicate()[1]
            opened = tried.returncode == 0
        else:
            refusal = self._network.stderr.read()
        if not opened:
            self.isolated, self.reason = False, " ".join(refusal.split()[-8:])
            self.close()

    def start(self, node: int, command: list[str], **options) -> subprocess.Popen:
        """Start a command on a node.

        Args:
            node: Its number.
            command: A program and its arguments.
            **options: As for `subprocess.Popen`.
        """
        if self.isolated:
            command = [*self._enter(node), *command]
        process = subprocess.Popen(command, **options)
        self._running[node].append(process)
        return process

    def _enter(self, node: int) -> list[str]:
        assert self._network is not None
        owner = f"nsenter --target {self._network.pid} --user --mount --wd=. "
        inside = f"nsenter --net=/run/netns/node{node} setpriv --pdeathsig KILL "
        # Who kills this process kills all that runs in its process table.
        machine = "unshare --uts --pid --fork --kill-child --mount-proc "
        name = ["sh", "-c", 'hostname "$0"; exec "$@"', f"node{node}"]
        return [*shlex.split(owner + inside + machine), *name]

    def unplug(self, node: int) -> None:
        """Kill all that runs on a node at once, as if its power had failed.

        Args:
            node: Its number.
        """
        for process in self._running[node]:
            if process.poll() is None:
                tree = psutil.Process(process.pid)
                # On the loopback nobody else ends what the command has started.
                victims = [] if self.isolated else tree.children(recursive=True)
                for victim in (tree, *victims):
                    victim.kill()
                process.wait()

    def limit(self, node: int, bytes_per_s: float) -> None:
        """Slow down what a node sends.

        Args:
            node: Its number, of an isolated network.
            bytes_per_s: The new rate.
        """
        rate = f"rate {bytes_per_s * 8:.0f}bit burst 32kb latency 1s"
        self._in_network(f"tc -n node{node} qdisc replace dev eth0 root tbf {rate}")

    def sent_bytes(self, node: int) -> int:
        """Return the bytes that have left a node through its interface, with headers.

        Args:
            node: Its number, of an isolated network.
        """
        show = f"nsenter --net=/run/netns/node{node} cat /proc/net/dev"
        lines = self._in_network(show).splitlines()
        return int(next(it for it in lines if "eth0" in it).split()[9])

    def _in_network(self, command: str) -> str:
        assert self._network is not None, self.reason
        enter = f"nsenter --target {self._network.pid} --user --net --mount "
        return subprocess.run(
            shlex.split(enter + command), check=True, capture_output=True, text=True
        ).stdout

    def close(self) -> None:
        """End all that runs on the nodes, and the network."""
        for node in range(len(self._running)):
            self.unplug(node)
        if self._network is not None:
            self._network.communicate()  # its standard input closes: it ends
            self._network = None

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
