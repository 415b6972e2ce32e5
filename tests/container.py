"""What a Dockerfile's build stage leaves, run as in a pod of Pod Security "restricted", without a container runtime.

A Dockerfile's COPY lines lay out a clean directory, and its install line runs there. The programs run in a mount
namespace: the root read-only, a user that owns nothing and has no capabilities, volumes and /tmp the only places to
write. The machine's own libraries stand for the base image's. Needs root; skipped without.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCKERFILES = {"serving": ROOT / "Dockerfile", "training": ROOT / "Dockerfile.training"}
USER = 10001
# $1: an empty directory for the new root; "ro" and "rw" and a path each, what is seen there; then the command
ENTER = """
set -eu
root=$1 && shift
mount -t tmpfs -o mode=755 none "$root"
mkdir "$root/tmp" "$root/proc" "$root/dev" "$root/etc"
mount -t tmpfs -o mode=1777 none "$root/tmp"
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
cp /etc/ld.so.cache /etc/nsswitch.conf /etc/hosts "$root/etc"
for place in /usr /bin /sbin /lib /lib64; do
  if [ -L "$place" ]; then ln -s "$(readlink "$place")" "$root$place"; continue; fi
  if [ -d "$place" ]; then mkdir "$root$place" && mount --bind "$place" "$root$place"; fi
  if [ -d "$place" ]; then mount -o remount,bind,ro "$root$place"; fi
done
while [ "$1" != -- ]; do
  mkdir -p "$root$3"
  mount --bind "$2" "$root$3"
  [ "$1" = rw ] || mount -o remount,bind,ro "$root$3"
  shift 3
done
shift
mount -o remount,ro "$root"
exec chroot "$root" setpriv --reuid USER --regid USER --clear-groups --no-new-privs --inh-caps=-all \\
  --bounding-set=-all --ambient-caps=-all "$@"
""".replace("USER", str(USER))


@dataclass(frozen=True, slots=True)
class Dockerfile:
    """The lines of one that matter here."""

    text: str
    copied: tuple[str, ...]  # from the checkout
    install: tuple[str, ...]  # docker/install, kind, directory, SBOM
    environment: Mapping[str, str]  # of the last stage


def read(path: Path) -> Dockerfile:
    text = path.read_text()
    plain = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    copies = re.findall(r"^COPY (?!--)(.+)$", plain, re.MULTILINE)
    copied = tuple(name for line in copies for name in line.split()[:-1])
    (install,) = re.findall(r"^RUN (docker/install .+)$", plain, re.MULTILINE)
    settings = " ".join(re.findall(r"^ENV (.+)$", plain.rpartition("\nFROM ")[2], re.MULTILINE))
    return Dockerfile(text, copied, tuple(install.split()), dict(item.split("=", 1) for item in settings.split()))


@dataclass(slots=True)
class Image:
    """An image's own files: its environment at `directory`, its bill of materials at `sbom`."""

    directory: Path
    sbom: Path
    environment: Mapping[str, str]
    root: Path
    volumes: dict[Path, str] = field(default_factory=dict)  # a directory here -> where a container sees it, writable
    configs: dict[Path, str] = field(default_factory=dict)  # the same, read-only

    def command(self, *words: str) -> list[str]:
        """The command that runs `words` inside."""
        seen = [("ro", str(self.directory), str(self.directory)), ("ro", sys.base_prefix, sys.base_prefix)]
        if sys.base_prefix == "/usr":
            seen.pop()
        seen += [("ro", str(here), there) for here, there in self.configs.items()]
        seen += [("rw", str(here), there) for here, there in self.volumes.items()]
        binds = [word for bind in seen for word in bind]
        return ["unshare", "--mount", "sh", "-c", ENTER, "enter", str(self.root), *binds, "--", *words]

    def settings(self, **more: str) -> dict[str, str]:
        path = self.environment["PATH"].replace("/opt/depo-gateway", str(self.directory))
        path = path.replace("$PATH", "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        return {"HOME": "/", "LANG": "C.UTF-8", **self.environment, "PATH": path, **more}

    def run(self, *words: str, **more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.command(*words), env=self.settings(**more), capture_output=True, text=True, timeout=240, check=False
        )

    def start(self, *words: str, **more: str) -> "subprocess.Popen[str]":
        """The process is the command itself: signals reach it."""
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(self.command(*words), env=self.settings(**more), **options)

    def volume(self, here: Path, there: str) -> Path:
        """A new directory that a container sees at `there` and may write to."""
        here.mkdir()
        os.chown(here, USER, USER)
        self.volumes[here] = there
        return here


def build(dockerfile: Path, work: Path) -> Image:
    """Runs the build stage's own steps: what is copied into a clean directory, and docker/install there."""
    recipe = read(dockerfile)
    context, directory, sbom = work / "src", work / "opt", work / "doc" / "sbom.cdx.json"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *recipe.copied]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).exists():
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, context / name, follow_symlinks=False)  # depo_gateway/ holds links to folders
    script, kind, *_ = recipe.install
    built = subprocess.run(
        [script, kind, str(directory), str(sbom)],
        cwd=context, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-4000:]
    (work / "root").mkdir()
    return Image(directory, sbom, recipe.environment, work / "root")


def needs_root() -> None:
    """Skips where there are no mount namespaces for us."""
    able = os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "true"], check=False).returncode == 0
    if not able:
        pytest.skip("needs root, for a mount namespace and another user")
