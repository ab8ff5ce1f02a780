"""The bill of materials of an image, CycloneDX 1.6 as JSON on stdout: sbom.py TITLE DPKG_STATUS SITE_PACKAGES

Python packages with versions and licences from their metadata, Debian packages from dpkg's status. The same packages give the same text.
"""

from __future__ import annotations

import hashlib
import json
import sys
import uuid
from importlib.metadata import distributions
from pathlib import Path
from urllib.parse import quote


def python_packages(site: str) -> list[dict[str, object]]:
    """Return a component for each distribution in a site-packages folder."""
    found = []
    for d in distributions(path=[site]):
        name = d.metadata["Name"].lower().replace("_", "-").replace(".", "-")
        entry: dict[str, object] = {
            "type": "library",
            "name": name,
            "version": d.version,
            "purl": f"pkg:pypi/{name}@{quote(d.version)}",
        }
        expression = d.metadata.get("License-Expression")
        text = (d.metadata.get("License") or "").strip()
        if expression:
            entry["licenses"] = [{"expression": expression}]
        elif text and "\n" not in text and len(text) < 80:
            entry["licenses"] = [{"license": {"name": text}}]
        found.append(entry)
    return found


def debian_packages(status: str) -> list[dict[str, object]]:
    """Return a component for each installed package of a dpkg status file."""
    found = []
    for paragraph in status.split("\n\n"):
        fields = dict(
            line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and not line.startswith(" ")
        )
        if not fields.get("Status", "").endswith(" installed"):
            continue
        name, version, architecture = fields["Package"], fields["Version"], fields["Architecture"]
        purl = f"pkg:deb/debian/{name}@{quote(version)}?arch={architecture}"
        found.append({"type": "library", "name": name, "version": version, "purl": purl})
    return found


def bill(title: str, components: list[dict[str, object]]) -> dict[str, object]:
    """Return the document; its serial number follows from its content."""
    components = sorted(({**c, "bom-ref": c["purl"]} for c in components), key=lambda c: str(c["purl"]))
    digest = hashlib.sha256(json.dumps([title, components], sort_keys=True).encode()).digest()
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.UUID(bytes=digest[:16], version=4)}",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": title, "bom-ref": title}},
        "components": components,
    }


if __name__ == "__main__":
    title, status, site = sys.argv[1:]
    found = bill(title, python_packages(site) + debian_packages(Path(status).read_text(encoding="utf-8")))
    json.dump(found, sys.stdout, indent=1, ensure_ascii=False)
