"""A port to serve at."""

import errno
import socket


def free_port(host: str, port: int) -> int:
    """The first free port from `port` on.

    Raises:
        OSError: if none of a hundred is free, or `host` is no address of this machine.
    """
    for each in range(port, min(port + 100, 2**16)):
        try:
            with socket.create_server((host, each)):
                return each
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                reason = error.strerror.partition(" (")[0]
                raise OSError(error.errno, reason, host) from error
    raise OSError(errno.EADDRINUSE, "no port is free", f"{host}:{port}")
