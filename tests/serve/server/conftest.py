"""Fixtures that several tests of the server share."""

import subprocess

import pytest


@pytest.fixture
def anyio_backend():
    """The event loop of tests that are coroutines."""
    return "asyncio"


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """Paths of a certificate for 127.0.0.1 and of its key."""
    folder = tmp_path_factory.mktemp("tls")
    paths = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-out", paths[0], "-keyout", paths[1]]
    subprocess.run(command, check=True, capture_output=True)
    return paths
