"""A temporary PostgreSQL server for a test: unprivileged, on the loopback interface, in a temporary folder."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SECONDS = 60  # until it answers


@contextmanager
def postgresql() -> Iterator[str]:
    """Start a server and yield the URL of an empty database; skip the test if PostgreSQL is not installed."""
    pytest.importorskip("psycopg2", reason="needs psycopg2: pip install 'mpq[postgresql]'")
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [
        Path(found) for found in [shutil.which("initdb")] if found
    ]
    if not binaries:
        pytest.skip("needs PostgreSQL's server: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="mpq-postgresql-"))
    owner: dict[str, str] = {}
    if os.geteuid() == 0:  # it refuses to run as root
        owner = {"user": "nobody", "group": "nogroup"}
        shutil.chown(folder, **owner)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs, data = binaries[-1].parent, folder / "data"
    options = {"cwd": folder, "stdout": subprocess.DEVNULL, **owner}
    begin = [programs / "initdb", "-D", data, "-U", "mpq", "-A", "trust", "--no-sync"]
    subprocess.run(begin, check=True, **options)  # type: ignore[call-overload]
    serve = [programs / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", folder, "-F"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(serve, stderr=log, **options)  # type: ignore[call-overload]
    try:
        ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
        end = time.monotonic() + SECONDS
        while subprocess.run(ready, check=False).returncode != 0:
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.1)
        yield f"postgresql://mpq@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)  # SIGTERM would wait for clients that still hold connections
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)
