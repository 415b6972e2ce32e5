"""docker/sbom.py ENVIRONMENT PYPROJECT FILE: a CycloneDX bill of materials of an image, for scanners and auditors.

The Python packages are cyclonedx-py's, run with this interpreter; the interpreter and Debian's packages are added,
because the image has them, too. The build stage's base is the final stage's, so its packages are the same.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

RELEASE = Path("/etc/os-release")
FIELDS = r"${binary:Package}\t${Version}\t${Architecture}\t${source:Package}\n"


def main() -> int:
    environment, pyproject, place = sys.argv[1:]
    command = [sys.executable, "-m", "cyclonedx_py", "environment", environment, "--pyproject", pyproject]
    command += ["--output-reproducible", "--spec-version", "1.6", "--output-file", place]
    subprocess.run(command, check=True)
    bill = json.loads(Path(place).read_text())
    bill["metadata"]["component"]["version"] = product_version(Path(environment))  # pyproject computes it
    bill["components"] = [*bill["components"], interpreter(), *debian()]
    Path(place).write_text(json.dumps(bill, indent=1) + "\n")
    return 0


def product_version(environment: Path) -> str:
    places = [str(place) for place in environment.glob("lib/python3*/site-packages")]
    (found,) = importlib.metadata.distributions(name="depo-gateway", path=places)
    return found.version


def interpreter() -> dict[str, Any]:
    version = platform.python_version()
    return {
        "type": "platform",
        "bom-ref": f"python-{version}",
        "name": "python",
        "version": version,
        "purl": f"pkg:generic/python@{version}",
        "cpe": f"cpe:2.3:a:python:python:{version}:*:*:*:*:*:*:*",
    }


def debian() -> list[dict[str, Any]]:
    """Debian and its packages; nothing on another system."""
    release = dict(line.split("=", 1) for line in RELEASE.read_text().splitlines() if "=" in line)
    name, version = (release.get(key, "").strip('"') for key in ("ID", "VERSION_ID"))
    if name != "debian":
        return []
    system = {"type": "operating-system", "bom-ref": f"{name}-{version}", "name": name, "version": version}
    listed = subprocess.run(
        ["dpkg-query", "--show", f"--showformat={FIELDS}"],
        check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    return [system, *(package(line, f"{name}-{version}") for line in listed.stdout.splitlines())]


def package(line: str, distribution: str) -> dict[str, Any]:
    name, version, architecture, source = line.split("\t")
    name = name.partition(":")[0]
    purl = f"pkg:deb/debian/{quoted(name)}@{quoted(version)}?arch={architecture}&distro={distribution}"
    purl += f"&upstream={quoted(source)}" if source != name else ""
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def quoted(text: str) -> str:
    """As a package URL wants it."""
    return text.replace("%", "%25").replace("+", "%2B").replace(":", "%3A")


if __name__ == "__main__":
    sys.exit(main())
