"""Ports: is this one free, and which one is."""

from __future__ import annotations

import socket

from engine.errors import StartError


def listen(host: str, port: int, who: str, setting: str = "VELOCITY_PORT") -> socket.socket:
    """A bound socket that is ready to be handed on. Raises StartError if the port is in use or may not be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise StartError(
            f"Port {port} on {host}, wanted for {who}, can't be used: {error.strerror}. "
            f"End what uses it, or choose another port ({setting})."
        ) from None
    return bound


def require_free(host: str, port: int, who: str) -> None:
    """Raise StartError if `who` could not listen there."""
    listen(host, port, who).close()


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listened on just now."""
    with listen(host, 0, "a free port") as bound:
        number: int = bound.getsockname()[1]
    return number
