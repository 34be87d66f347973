"""Sockets that the server listens at, opened before the model is loaded.

So a port that is in use, or a certificate that cannot be used, is found at once and not after
minutes.
"""

import errno
import fcntl
import ipaddress
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from serve.server.config import ServerConfig

BACKLOG = 2048
NO_SUCH_FAMILY = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}


@contextmanager
def listening(config: ServerConfig) -> Iterator[list[socket.socket]]:
    """Listen at the host and port or the Unix socket of the settings; at the end close the sockets
    and remove the Unix socket.

    Raises OSError that names the setting that cannot be used.
    """
    tls_context(config)
    with ExitStack() as stack:
        if config.uds is not None:
            yield [stack.enter_context(_unix_socket(config.uds))]
            return
        sockets = _tcp_sockets(config.host, config.port)
        for taken in sockets:
            stack.enter_context(taken)
        yield sockets


def url_of(listener: socket.socket, is_tls: bool) -> str:
    """Return the URL of a socket."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if listener.family == socket.AF_INET6 else host
    return f"{'https' if is_tls else 'http'}://{shown}:{port}"


def is_reached_from_outside(listener: socket.socket) -> bool:
    """Return whether other machines may reach a socket."""
    if listener.family == socket.AF_UNIX:
        return False
    return not ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """Return what connections with TLS use, None without a certificate. Raises OSError that names
    the files if they cannot be used."""
    if config.tls_certificate is None or config.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password, OpenSSL would ask for that of an encrypted key on the terminal.
        context.load_cert_chain(config.tls_certificate, config.tls_key, password=lambda: "")
    except OSError as error:
        raise OSError(
            f"--tls-certificate {config.tls_certificate}, --tls-key {config.tls_key}: cannot be "
            f"used ({error.strerror or error}): give a certificate in PEM and its key without a "
            "passphrase"
        ) from error
    return context


def _tcp_sockets(host: str, port: int) -> list[socket.socket]:
    """Return a socket for each address of `host`, all with the same port if it is 0."""
    sockets: list[socket.socket] = []
    skipped: OSError | None = None
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, address in dict.fromkeys(found):
            if sockets:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            try:
                sockets.append(_tcp_socket(family, kind, protocol, address))
            except OSError as error:
                # "localhost" has an IPv6 address even on machines without IPv6.
                if error.errno not in NO_SUCH_FAMILY or len(found) == 1:
                    raise
                skipped = error
        if not sockets and skipped is not None:
            raise skipped
    except OSError as error:
        for taken in sockets:
            taken.close()
        raise OSError(
            f"--host {host} --port {port}: the server cannot listen there "
            f"({error.strerror or error}): choose others, or stop the program that uses them"
        ) from error
    return sockets


def _tcp_socket(
    family: int, kind: int, protocol: int, address: tuple[object, ...]
) -> socket.socket:
    made = socket.socket(family, kind, protocol)
    try:
        # Otherwise connections of a server that has ended would keep its port for a minute.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
        made.listen(BACKLOG)
    except OSError:
        made.close()
        raise
    return made


@contextmanager
def _unix_socket(path: Path) -> Iterator[socket.socket]:
    """Listen at `path`, with the permissions that the umask leaves."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        try:
            with _locked(path.parent):
                _remove_stale(path)
                made.bind(str(path))
                made.listen(BACKLOG)
            own = path.stat()
        except OSError as error:
            raise OSError(
                f"--uds {path}: the server cannot listen there ({error.strerror or error}): choose "
                "another path"
            ) from error
        try:
            yield made
        finally:
            with suppress(FileNotFoundError), _locked(path.parent):
                if os.path.samestat(path.stat(), own):  # not the socket of another server
                    path.unlink()


def _remove_stale(path: Path) -> None:
    """Remove the socket of a server that was killed. Raises OSError if `path` is anything else."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(errno.EEXIST, "there is a file that is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        try:
            other.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(errno.EADDRINUSE, "another server listens there")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other servers that start now from removing a new socket in `folder` as stale."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
