"""Where events may be sent to: to no address of a private network, whatever a tenant writes and a name server answers.

An address is looked up once, every answer is checked, and the connection goes to exactly what was checked.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import httpcore
import httpx

from workers.errors import InputError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Lookup = Callable[[str, int], asyncio.Future[Sequence[str]]]
"""Addresses of a host, for a port. Raises OSError."""

_URL_MOST = 2048
_HOST_MOST = 253
_ADDRESSES = 3
"""Of one name that are tried."""
_NAME = re.compile(r"([A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?")
_NUMBER = re.compile(r"0[xX][0-9A-Fa-f]*|[0-9]+")
"""Last label of what old resolvers read as an IPv4 address, such as 127.1 or 0x7f000001."""
_NOT_PUBLIC = "leads to an address that is not public"
_PLAIN = "must begin with https://; without TLS events go only to networks that the operator allows"

_GLOBAL_IPV6 = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_NEVER = tuple(
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "2001::/23", "3fff::/20")
)
"""What some versions of Python take for public: protocol assignments, relays, examples; and Azure's inner service."""


def parse_url(url: str, allow: Sequence[Network], param: str = "webhook") -> httpx.URL:
    """Raises InputError for an address that no event will ever be sent to. Asks no name server."""

    def refused(why: str) -> InputError:
        return InputError(f"The webhook's address {why}.", param)

    parsed = _well_formed(url, refused)
    plain = parsed.scheme == "http"
    if plain and not allow:
        raise refused("must begin with https://")
    host = parsed.raw_host.decode()
    literal = _literal(host)
    if literal is None:
        if len(host) > _HOST_MOST or not _NAME.fullmatch(host) or _NUMBER.fullmatch(host.rstrip(".").split(".")[-1]):
            raise refused("has a host that is neither a name nor a plain IP address")
    elif not _permitted(literal, allow, plain=plain):
        raise refused(_PLAIN if plain else _NOT_PUBLIC)
    return parsed


def _well_formed(url: str, refused: Callable[[str], InputError]) -> httpx.URL:
    if len(url) > _URL_MOST:
        raise refused(f"is longer than {_URL_MOST:,} characters")
    if re.search(r"[\x00-\x20\x7f\\]", url):
        raise refused("has spaces, control characters or backslashes")
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        raise refused("is not a valid URL") from None
    if parsed.scheme not in {"https", "http"} or not parsed.raw_host:
        raise refused("must begin with https:// and a host")
    if "@" in re.split(r"[/?#]", url.partition("://")[2], maxsplit=1)[0]:
        raise refused("must not have a user name or password; the signature says who sends")
    if "#" in url:
        raise refused("must not have a fragment (#)")
    if parsed.port is not None and not 1 <= parsed.port <= 65535:
        raise refused("has a port that does not exist")
    return parsed


def _literal(host: str) -> Address | None:
    if host.lower().rstrip(".").rpartition(".")[2] == "localhost":
        return IPv4Address("127.0.0.1")
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _permitted(address: Address, allow: Sequence[Network], *, plain: bool) -> bool:
    """Whether events may go there; without TLS only to networks that the operator named."""
    return all(
        any(target in network for network in allow) or (not plain and _public(target)) for target in _leads_to(address)
    )


def _leads_to(address: Address) -> tuple[Address, ...]:
    """Where packets end: IPv6 has several ways to write down, or to tunnel to, an IPv4 address."""
    if isinstance(address, IPv4Address):
        return (address,)
    if address in _NAT64:
        return (IPv4Address(int(address) & 0xFFFFFFFF),)
    inner = address.ipv4_mapped or address.sixtofour
    return address.teredo or ((inner,) if inner else (address,))


def _public(address: Address) -> bool:
    if isinstance(address, IPv6Address) and address not in _GLOBAL_IPV6:
        return False
    special = address.is_multicast or address.is_reserved or any(address in network for network in _NEVER)
    return address.is_global and not special


class Guarded(httpcore.AsyncNetworkBackend):
    """Connects to permitted addresses only, and never looks a name up a second time (DNS rebinding).

    Raises InputError where it refuses.
    """

    def __init__(self, lookup: Lookup, allow: Sequence[Network], *, plain: bool) -> None:
        self._lookup = lookup
        self._allow = allow
        self._plain = plain
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """One connection, to the first of its addresses that answers within `timeout` seconds."""
        try:
            found = [ipaddress.ip_address(address) for address in await self._lookup(host, port)]
        except (OSError, UnicodeError):
            found = []
        if not found:
            raise InputError("The name of the webhook's host has no address.", "webhook")
        if not all(_permitted(address, self._allow, plain=self._plain) for address in found):
            raise InputError(f"The webhook's address {_PLAIN if self._plain else _NOT_PUBLIC}.", "webhook")
        failure: Exception = httpcore.ConnectError()
        for address in found[:_ADDRESSES]:
            try:
                return await self._inner.connect_tcp(str(address), port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure
