"""SIGHUP, at which the server reads its keys and its certificate again.

`systemctl reload` and programs that renew a certificate send it, and so does a terminal that is
closed, after which the server goes on. Connections and requests that have begun are left alone.
"""

import logging

from serve.server.access.keys import Keys
from serve.server.config import ServerConfig
from serve.server.connections import Connections
from serve.server.listening import tls_context
from stu.common.errors import UserError

logger = logging.getLogger("stu")


def read_again(config: ServerConfig, keys: Keys, connections: Connections) -> None:
    """Use the keys and the certificate that the files have now. What cannot be used is logged, and
    the old one stays."""
    if keys.path is None and config.tls_certificate is None:
        logger.warning(
            "SIGHUP is ignored: there is no file of --api-keys or --tls-certificate to read again; "
            "send SIGTERM to stop"
        )
    if keys.path is not None:
        try:
            keys.read()
        except (UserError, OSError) as error:
            logger.error("the old API keys stay valid: %s", error)
        else:
            logger.info("%d API keys were read from %s", len(keys), keys.path)
    if config.tls_certificate is not None:
        try:
            connections.context = tls_context(config)
        except OSError as error:
            logger.error("the old certificate stays in use: %s", error)
        else:
            logger.info("the certificate was read from %s", config.tls_certificate)
