"""containerd as a component: with a root, a state and a socket of its own, and no registry that it could ask."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

from components import Component, wait_for
from oci import PAUSE
from packages import CNI, SEARCH_PATH

_NAMESPACE = "k8s.io"


class Containerd:
    """One containerd, in a network namespace or in this machine's."""

    def __init__(self, folder: Path, root: Path, namespace: Path | None = None) -> None:
        self.folder = folder
        self.socket = folder / "containerd.sock"
        self._root = root
        inside = ["nsenter", f"--net={namespace}"] if namespace else []
        command = [f"PATH={SEARCH_PATH}", *inside, "containerd", f"--config={folder / 'containerd.toml'}"]
        self.component = Component(Path("/usr/bin/env"), command, folder / "containerd.log")

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.socket.unlink(missing_ok=True)
        # Port 1 of the loopback is nobody's: an image that is not here is missed at once, and nobody outside is asked.
        hosts = self.folder / "certs.d" / "_default" / "hosts.toml"
        hosts.parent.mkdir(parents=True, exist_ok=True)
        hosts.write_text('server = "http://127.0.0.1:1"\n')
        (self.folder / "containerd.toml").write_text(self._config())
        self.component.start()
        wait_for(self._answers, f"{self.socket} answers")

    def images(self) -> set[str]:
        """Names of the images that it has."""
        return set(self.ctr("images", "list", "--quiet").split())

    def blobs(self) -> set[str]:
        """Digests of what its images consist of."""
        return set(self.ctr("content", "list", "--quiet").split())

    def ctr(self, *arguments: str, stdin: int | None = None) -> str:
        """Ask it something. Raises CalledProcessError with what it said as a note."""
        done = subprocess.run(
            ["ctr", f"--address={self.socket}", f"--namespace={_NAMESPACE}", *arguments],
            stdin=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            error = subprocess.CalledProcessError(done.returncode, ["ctr", *arguments])
            error.add_note(done.stderr)
            raise error
        return done.stdout

    def _answers(self) -> bool:
        if not self.component.running:
            raise RuntimeError(f"containerd ended: {self.component.log_end()}")
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(self.socket)) == 0

    def _config(self) -> str:
        """Its configuration, version 2."""
        return f"""version = 2
root = "{self._root}"
state = "{self.folder / "state"}"
disabled_plugins = [
  "io.containerd.internal.v1.opt",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]

[grpc]
address = "{self.socket}"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
# The kubelet asks for values that a machine inside a container may not set.
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{CNI}"
conf_dir = "{self.folder / "cni"}"

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
Root = "{self.folder / "runc"}"
SystemdCgroup = false

[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "{self.folder / "certs.d"}"
"""
