"""Create certificates with openssl: one authority, one certificate per identity, one kubeconfig per client.

For RBAC, the common name is the user and the organisation is the group.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path

from processes import Trouble

_EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def _openssl(*argv: str, cwd: Path) -> None:
    if shutil.which("openssl") is None:
        raise Trouble("openssl is not installed; on Debian: apt-get install openssl")
    done = subprocess.run(["openssl", *argv], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise Trouble(f"openssl {argv[0]} failed: {done.stderr.strip()[-400:]}")


class Authority:
    """A certificate authority in a folder: `ca.crt`, `ca.key`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        if not (folder / "ca.crt").exists():
            # the training-operator requires an RSA key in the old format, and the authority's name as an alternative name
            _openssl("genrsa", "-traditional", "-out", "ca.key", "2048", cwd=folder)
            _openssl("req", "-x509", "-new", "-key", "ca.key", "-days", "3650", "-subj", f"/CN={name}", "-out", "ca.crt",
                     "-addext", "keyUsage=critical,keyCertSign,cRLSign", "-addext", f"subjectAltName=DNS:{name}",
                     cwd=folder)  # fmt: skip

    def certificate(self, name: str, subject: str, *alternatives: str) -> None:
        """Create `NAME.crt` and `NAME.key` for client and server use, with alternative names such as `IP:127.0.0.1`, `DNS:localhost`."""
        if (self.folder / f"{name}.crt").exists():
            return
        extensions = "extendedKeyUsage=serverAuth,clientAuth\n"
        if alternatives:
            extensions += f"subjectAltName={','.join(alternatives)}\n"
        (self.folder / f"{name}.ext").write_text(extensions)
        _openssl("req", *_EC, "-subj", subject, "-keyout", f"{name}.key", "-out", f"{name}.csr", cwd=self.folder)
        _openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
                 "-days", "3650", "-extfile", f"{name}.ext", "-out", f"{name}.crt", cwd=self.folder)  # fmt: skip
        (self.folder / f"{name}.csr").unlink()
        (self.folder / f"{name}.ext").unlink()

    def kubeconfig(self, name: str, subject: str, server: str, *alternatives: str) -> Path:
        """Create `NAME.kubeconfig`, which contains all data, and the certificate for it; return its path."""
        self.certificate(name, subject, *alternatives)

        def inline(file: str) -> str:
            return base64.b64encode((self.folder / file).read_bytes()).decode()

        user = {"client-certificate-data": inline(f"{name}.crt"), "client-key-data": inline(f"{name}.key")}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "egm", "cluster": {"server": server, "certificate-authority-data": inline("ca.crt")}}
            ],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "egm", "context": {"cluster": "egm", "user": name}}],
            "current-context": "egm",
        }
        path = self.folder / f"{name}.kubeconfig"
        path.touch(mode=0o600)
        path.write_text(json.dumps(config, indent=1))
        return path

    def signing_pair(self, name: str) -> None:
        """Create an RSA key pair `NAME.key`, `NAME.pub` for service account tokens."""
        if not (self.folder / f"{name}.pub").exists():
            _openssl("genrsa", "-out", f"{name}.key", "2048", cwd=self.folder)
            _openssl("rsa", "-in", f"{name}.key", "-pubout", "-out", f"{name}.pub", cwd=self.folder)
