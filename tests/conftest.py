"""Settings of all tests: examples have no time limit, because machines are busy; a real S3 server (SeaweedFS) as a fixture."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("egm", deadline=None)
settings.load_profile("egm")

KEY, SECRET = "test-key", "test-secret-0123456789"  # these keys are valid only for the server of the tests


def free_ports(count):
    """Return free ports whose gRPC port, 10,000 higher, is also free."""
    ports = []
    while len(ports) < count:
        with socket.socket() as s, socket.socket() as grpc:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
            if port < 55000 and port not in ports:
                try:
                    grpc.bind(("127.0.0.1", port + 10000))
                except OSError:
                    continue
                ports.append(port)
    return ports


class S3Server:
    """SeaweedFS in one process with one folder; stored files survive `kill` and `start`."""

    def __init__(self, folder):
        self.folder, self.process = folder, None
        self.ports = free_ports(4)
        self.url = f"http://127.0.0.1:{self.ports[0]}"
        identity = {"name": "t", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
        (folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
        self.start()

    def start(self):
        s3, master, volume, filer = map(str, self.ports)
        weed = Path(sys.executable).with_name("weed")
        log = (self.folder / "weed.log").open("ab")
        self.process = subprocess.Popen(
            [
                *(weed, "server", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"),
                *(f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
                *(f"-s3.config={self.folder / 'identities.json'}", "-s3.autoCreateBucket=false", "-s3.port.iceberg=0"),
                *("-s3.port.lance=0", "-volume.max=2000", "-master.volumeSizeLimitMB=64", "-master.telemetry=false"),
            ],
            cwd=self.folder,
            stdout=log,
            stderr=log,
        )
        log.close()
        until = time.monotonic() + 60
        while True:
            assert self.process.poll() is None, (self.folder / "weed.log").read_text()[-3000:]
            assert time.monotonic() < until, (
                "SeaweedFS does not become ready: " + (self.folder / "weed.log").read_text()[-3000:]
            )
            try:
                urllib.request.urlopen(self.url + "/status", timeout=2)
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                time.sleep(0.1)

    def client(self):
        import boto3

        keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.url, **keys)

    def make_bucket(self, name):
        until, client = time.monotonic() + 60, self.client()
        client.create_bucket(Bucket=name)
        while True:  # the server can store only some time after its port is open
            try:
                client.put_object(Bucket=name, Key="first", Body=b"x")
                client.delete_object(Bucket=name, Key="first")
                return
            except Exception:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self):
        if self.process.poll() is None:
            self.kill()


@pytest.fixture(scope="session")
def _s3_server(tmp_path_factory):
    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.close()


_buckets = iter(range(1, 10**6))


@pytest.fixture
def s3(_s3_server, monkeypatch, tmp_path):
    """Return the server and the name of a new bucket, and set the environment so that boto3 uses this server."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", _s3_server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("EGM_CACHE", str(tmp_path / "cache"))
    bucket = f"bucket-{next(_buckets)}"
    _s3_server.make_bucket(bucket)
    return _s3_server, bucket
