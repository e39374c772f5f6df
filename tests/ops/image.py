"""Builds sidecar/Dockerfile without Docker and runs the result locked down: buildah in a chroot, then bubblewrap.

The image's true base cannot be had where there is no Docker; a Debian made by debootstrap stands in for it. Needs root.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "image"
BASE = "localhost/agx-standin:latest"
USER = 10001
_SUITE, _PYTHON = "bookworm", "3.11"  # of the stand-in
_STORE = ("--root", str(WORK / "store"), "--runroot", str(WORK / "run"), "--storage-driver", "vfs")
_PLATFORMS = ("manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux_2_28_x86_64", "manylinux_2_34_x86_64")


@dataclass(frozen=True, slots=True)
class Image:
    """A built image: its files, and what its configuration says."""

    files: Path
    config: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes that the image adds to its base."""
        return sum(path.lstat().st_size for path in (self.files / "opt" / "agx").rglob("*") if not path.is_dir())


def build() -> Image:
    """Build the image on the stand-in base, without the network."""
    print("\ndownloading wheels ...", flush=True)
    wheels = _collect_wheels()
    _buildah("rm", "--all")  # what an earlier check left
    _buildah("rmi", "--prune", "--force")
    if not _buildah("images", "--quiet", BASE, check=False):
        _import_base(_bootstrap())
    print("building the image ...", flush=True)
    _buildah(
        "build",
        "--isolation=chroot",
        "--network=host",
        "--format=docker",  # the OCI format has no HEALTHCHECK
        "--file=sidecar/Dockerfile",
        f"--build-arg=BASE={BASE}",
        "--build-arg=PIP_NO_INDEX=1",
        "--build-arg=PIP_FIND_LINKS=/wheelhouse",
        f"--volume={wheels}:/wheelhouse:ro",
        "--tag=agx-sidecar",
        str(ROOT),
    )
    container = _buildah("from", "--pull-never", "agx-sidecar").strip()
    described = json.loads(_buildah("inspect", "--type=container", container))
    files = Path(_buildah("mount", container).strip())
    for parent in files.relative_to(WORK).parents:
        (WORK / parent).chmod(0o711)  # the image's user has to get there
    return Image(files, described["Docker"]["config"])


@contextmanager
def sandbox(image: Image, command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run a command of the image as its user: read-only root, no capabilities, process ids of its own."""
    inherited = dict(entry.split("=", 1) for entry in image.config["Env"])
    settings = [item for pair in (inherited | environment).items() for item in ("--setenv", *pair)]
    # As in a container the user is a real one, not root by another name: bubblewrap itself runs as it.
    unprivileged = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs"]
    locked = ["bwrap", "--unshare-user", "--unshare-pid", "--unshare-ipc", "--die-with-parent", "--as-pid-1"]
    locked += ["--ro-bind", str(image.files), "/", "--proc", "/proc", "--dev", "/dev", "--clearenv", "--chdir", "/"]
    full = [*unprivileged, *locked, "--cap-drop", "ALL", *settings, *command]
    process = subprocess.Popen(full, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run(image: Image, command: list[str], environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a command of the image to its end; returns its exit code and what it said."""
    with sandbox(image, command, environment or {}) as process:
        said, _ = process.communicate(timeout=60)
        return process.returncode, said


def process_inside(process: subprocess.Popen[str]) -> int:
    """Return the pid, outside, of the command that a sandbox runs."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0])


def _collect_wheels() -> Path:
    wheels = WORK / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(wheels)]
    if sys.version_info[:2] != tuple(int(part) for part in _PYTHON.split(".")):
        command += ["--python-version", _PYTHON, "--only-binary=:all:"]
        command += [f"--platform={platform}" for platform in _PLATFORMS]
    locked = ["--require-hashes", "--requirement", str(ROOT / "sidecar" / "requirements.txt")]
    # The last is what redis-py asks for on the stand-in's Python, 3.11.2, and not on later ones.
    for requirements in (locked, ["hatchling", "hatch-fancy-pypi-readme", *_tools(), "async-timeout"]):
        subprocess.run([*command, *requirements], check=True, timeout=600)
    return wheels


def _tools() -> list[str]:
    return re.findall(r"pip install (\S+==\S+)", (ROOT / "sidecar" / "Dockerfile").read_text())


def _bootstrap() -> Path:
    base = WORK / "base"
    if not (base / "usr" / "bin" / "python3").exists():
        shutil.rmtree(base, ignore_errors=True)
        print("making a base with debootstrap, which takes minutes ...", flush=True)
        packages = "--include=python3-minimal,python3-venv,ca-certificates"
        subprocess.run(["debootstrap", "--variant=minbase", packages, _SUITE, base], check=True, timeout=900)
    return base


def _import_base(base: Path) -> None:
    container = _buildah("from", "scratch").strip()
    _buildah("add", "--quiet", container, str(base), "/")
    _buildah("config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin", container)
    _buildah("commit", "--quiet", "--rm", container, BASE)


def _buildah(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(
        ["buildah", *_STORE, *arguments],
        check=False,
        stdout=subprocess.PIPE,
        stderr=None if arguments[0] == "build" else subprocess.PIPE,
        text=True,
        cwd=ROOT,
        timeout=900,
        env=os.environ | {"BUILDAH_ISOLATION": "chroot"},
    )
    if check and done.returncode:
        raise RuntimeError(f"buildah {' '.join(arguments)}: {done.stderr}\n{done.stdout[-3000:]}")
    return done.stdout
