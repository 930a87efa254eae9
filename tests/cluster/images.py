"""The images of this checkout for the nodes: a base of Debian packages, the Dockerfiles of `images/`, an OCI layout.

Everything but the layers with our own code is made once a machine. The trainer is built with PRUNE=true: nodes of the
test cluster have no GPU, and three gigabytes of kernels for one would be carried about for nothing.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "images"))

from binaries import cache
from build import CONTEXT, NAMES, Engine, ImageError, build, stage, tag_of
from image_store import ImageStore
from oci import Layout
from wheelhouse import default_folder, fill

# torch is linked with the C++ library.
_PACKAGES = "python3,ca-certificates,libstdc++6"
# An image is no place to read manuals in.
_WITHOUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/lintian/*")
BASE = f"localhost/sonoforge-base:{hashlib.sha256(' '.join((_PACKAGES, *_WITHOUT)).encode()).hexdigest()[:12]}"
"""The base image, named after what it is made from."""


def folder() -> Path:
    """Where they are kept, and the nodes that run them."""
    return cache() / "images"


def engine() -> Engine:
    """buildah with a storage of its own, so that nobody's images are touched."""
    storage = folder() / "buildah"
    return Engine("buildah", (f"--root={storage / 'root'}", f"--runroot={storage / 'run'}", "--storage-driver=overlay"))


def make_base(buildah: Engine) -> None:
    """Make the base image where it is missing."""
    try:
        buildah.run("inspect", "--type=image", BASE, quiet=True)
    except ImageError:
        pass
    else:
        return
    print("making the base image of the test cluster from Debian packages: a minute", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder()) as made:
        archive = Path(made) / "base.tar"
        excluded = [f"--dpkgopt=path-exclude={path}" for path in _WITHOUT]
        command = ["mmdebstrap", "--variant=essential", *excluded, f"--include={_PACKAGES}", "bookworm", str(archive)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ImageError(f"mmdebstrap failed: {done.stderr[-1000:]}")
        container = buildah.run("from", "scratch").strip()
        buildah.run("add", container, str(archive), "/")
        buildah.run("commit", "--rm", "--format=oci", "--timestamp=0", "--quiet", container, BASE)


def build_images(names: tuple[str, ...] = NAMES) -> Layout:
    """Build the images of this checkout; the layout has them by their tags. Fast where only our code has changed."""
    folder().mkdir(parents=True, exist_ok=True)
    buildah, layout = engine(), Layout(folder() / "layout")
    fill(default_folder())
    stage(default_folder())
    note = folder() / "built"
    now = _digest()
    if note.exists() and note.read_text() == now:
        return layout
    make_base(buildah)
    print("building the images of the test cluster: minutes once, seconds later", file=sys.stderr, flush=True)
    build(buildah, BASE, names, prune=True)
    for name in names:
        buildah.run("push", "--quiet", tag_of(name), f"oci:{layout.folder}:{tag_of(name)}")
    note.write_text(now)
    return layout


def store() -> ImageStore:
    """A store with the images of this checkout."""
    found = ImageStore(folder() / "store")
    # What a pod calls sonoforge/trainer is this to containerd.
    found.put(build_images(), [(tag_of(name), f"docker.io/{tag_of(name)}") for name in NAMES])
    return found


def _digest() -> str:
    """Names what the images are made from: Dockerfiles, locks and our wheel, whose bytes follow from the checkout."""
    digest = hashlib.sha256(BASE.encode())
    root = Path(__file__).parents[2]
    files = [*CONTEXT.glob("*.lock"), *CONTEXT.glob("own/*"), *root.glob("images/*/*"), root / "images" / "build.py"]
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
