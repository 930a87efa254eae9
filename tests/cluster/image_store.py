"""The images of the nodes: imported once a machine, and given to each node by hard link.

A layer of an image is a folder that is only read, so nodes can share its files. What containerd keeps about them is
written, so of that every node has a copy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from containerd import Containerd
from oci import PAUSE, Layout, write_pause


class ImageStore:
    """A containerd root that no node runs on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._root = folder / "root"

    def put(self, layout: Layout, images: Iterable[tuple[str, str]]) -> None:
        """Import images, each a reference of the layout and the name that pods use, where they are not there yet."""
        wanted = {name: layout.manifest(reference)["digest"] for reference, name in images}
        references = {name: reference for reference, name in images}
        note = self.folder / "images"
        now = "\n".join(f"{name} {digest}" for name, digest in sorted(wanted.items()))
        if note.exists() and note.read_text() == now:
            return
        note.unlink(missing_ok=True)
        containerd = Containerd(self.folder, self._root)
        containerd.start()
        try:
            if PAUSE not in containerd.images():
                with tempfile.TemporaryFile() as file:
                    write_pause(file)
                    file.seek(0)
                    containerd.ctr("images", "import", "-", stdin=file.fileno())
            for name in wanted:
                _import(containerd, layout, references[name], name)
        finally:
            containerd.component.stop()
        note.write_text(now)

    def link_to(self, root: Path) -> None:
        """Give a node a root with all images."""
        shutil.rmtree(root, ignore_errors=True)
        subprocess.run(["cp", "--archive", "--link", str(self._root), str(root)], check=True)
        for database in root.rglob("*.db"):
            copy = database.with_suffix(".copy")
            shutil.copy2(database, copy)
            copy.rename(database)


def _import(containerd: Containerd, layout: Layout, reference: str, name: str) -> None:
    """Stream what containerd lacks of an image."""
    known = containerd.blobs()
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as source:
        pid = os.fork()
        if pid == 0:  # a process and not a thread: hashing and copying gigabytes should not wait for this interpreter
            code = 1
            try:
                source.close()
                with os.fdopen(writing, "wb") as out:
                    layout.write_archive(out, reference, name, without=known)
                code = 0
            finally:
                os._exit(code)
        os.close(writing)
        try:
            containerd.ctr("images", "import", "-", stdin=source.fileno())
        finally:
            _, status = os.waitpid(pid, 0)
    assert status == 0, f"the archive of {reference} could not be written"
