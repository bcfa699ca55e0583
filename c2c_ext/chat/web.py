"""`c2c web`: the conversation in a browser, served to this machine alone unless told otherwise."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import threading
from typing import Any

from .command import prepared

MISSING = 'gradio is missing: pip install "c2c_ext[web]"'


def run_web(host: str, port: int, **options: Any) -> int:
    """Serves the page until Ctrl-C; returns the exit status.

    Args:
        host: the address to listen on.
        port: 0: any that is free.
        **options: see `prepared`.

    Raises:
        ValueError, OSError: an option or a file breaks a rule, gradio is missing, or the port is
            taken; says which.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        from .web_page import launch
    except ImportError as error:
        raise ValueError(f"{MISSING} ({error})") from error
    port = free_port(host, port)
    loopback = is_loopback(host)
    if not loopback:
        print(
            f"c2c web: warning: whoever reaches {host}:{port} can use these models; there is no "
            "password and no encryption",
            file=sys.stderr,
        )
    with prepared(**options) as (models, settings):
        server = launch(models, settings, host, port, loopback)
        shown_host = f"[{host}]" if ":" in host else host
        print(f"c2c web: http://{shown_host}:{port}  (Ctrl-C ends it)", flush=True)
        try:
            _wait()
        except KeyboardInterrupt:
            return 0
        finally:
            server.close(verbose=False)
    return 0


def _wait() -> None:
    threading.Event().wait()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def free_port(host: str, port: int) -> int:
    """``port``, or any that is free for 0; ValueError, naming the options, where that fails."""
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port must be in 0..65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
            return trial.getsockname()[1]
    except OSError as error:
        raise ValueError(f"--host {host} --port {port} cannot be used: {error}") from error
