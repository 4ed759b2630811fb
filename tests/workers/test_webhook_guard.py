"""Where events are never sent to: private addresses in every disguise, and names that lead there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from ipaddress import ip_network
from pathlib import Path

import pytest

from tests.webhook_receiver import Receiver, receiving, to
from workers.errors import InputError
from workers.job import new_id
from workers.settings import WorkerSettings
from workers.webhooks import Webhooks, check_url

TENANT = new_id("tenant")
HERE = (ip_network("127.0.0.0/8"),)
NAME = "hooks.example.com"


@pytest.fixture
async def plain() -> AsyncIterator[Receiver]:
    async with receiving() as running:
        yield running


async def failure(sender: Webhooks, url: str) -> str | None:
    """Why an event was not delivered; None if it was."""
    return (await sender.send(TENANT, url, "evt_1", b"{}")).error


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.com/", "https"), ("ftp://example.com/", "https"), ("example.com", "https"),
        ("https:", "https"), ("https:///x", "host"), ("//example.com", "https"), ("file:///etc/passwd", "https"),
        ("", "https"),
        ("https://u:p@example.com/", "password"), ("https://@example.com/", "password"),
        ("https://u@[::1]/", "password"),
        ("https://example.com/#x", "fragment"), ("https://example.com/#", "fragment"),
        ("https://example.com:0/", "port"), ("https://example.com:65536/", "port"), ("https://example.com:x/", "URL"),
        ("https://exa mple.com/", "spaces"), ("https://example.com/\r\nx: y", "spaces"),
        ("https://a\\@b/", "backslashes"),
        ("https://exa%6dple.com/", "host"), ("https://a..b/", "host"), ("https://" + "a" * 64 + ".com/", "host"),
        ("https://" + "a." * 130 + "com/", "host"), ("https://example.com/" + "a" * 2048, "longer"),
        ("https://127.1/", "host"), ("https://2130706433/", "host"), ("https://0x7f000001/", "host"),
        ("https://0x7f.0.0.0x1/", "host"), ("https://017700000001/", "host"), ("https://010.0.0.1/", "URL"),
        ("https://１２７.0.0.1/", "URL"), ("https://①②⑦.0.0.1/", "URL"), ("https://[::1%25lo]/", "not public"),
        ("https://localhost/", "not public"), ("https://a.LOCALHOST./", "not public"),
    ],
)  # fmt: skip
def test_addresses_that_are_refused_at_submission(url: str, why: str) -> None:
    with pytest.raises(InputError, match=why) as refused:
        check_url(url, ())
    assert refused.value.param == "webhook"


NOT_PUBLIC = (
    "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "100.100.100.200", "0.0.0.0",
    "255.255.255.255", "224.0.0.1", "240.0.0.1", "192.0.0.192", "192.0.2.1", "198.18.0.1", "192.88.99.1",
    "168.63.129.16", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "fe80::1", "fc00::1",
    "fd00:ec2::254", "fec0::1", "ff02::1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1",
    "2002:7f00:1::1", "2002:a9fe:a9fe::1", "2001:0:808:808::f5ff:fffe", "2001:0:7f00:1::f7f7:f7f7", "2001:db8::1",
    "2001:10::1", "3fff::1", "100::1", "5f00::1",
)  # fmt: skip
PUBLIC = (
    "1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1",
    "2001:0:808:808::f7f7:f7f7",
)  # fmt: skip


def literal(address: str) -> str:
    return f"https://[{address}]/" if ":" in address else f"https://{address}/"


@pytest.mark.parametrize("address", NOT_PUBLIC)
async def test_no_event_goes_to_an_address_that_is_not_public(address: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not public"):
        check_url(literal(address), ())
    for answers in ((address,), ("1.1.1.1", address), (address, "1.1.1.1")):
        result = await Webhooks(tmp_path, resolve=to(*answers)).send(TENANT, f"https://{NAME}/", "evt_1", b"")
        assert (result.status_code, result.error) == (
            None,
            "The webhook's address leads to an address that is not public.",
        )


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_fine(address: str) -> None:
    check_url(literal(address), ())


def test_what_the_operator_allows_may_be_private_and_plain() -> None:
    allow = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))
    for url in ("https://10.1.2.3/", "http://10.1.2.3:8080/x", "http://[fd00::1]/", "http://[::ffff:10.0.0.1]/"):
        check_url(url, allow)
    for url in (f"http://{NAME}/", f"https://{NAME}", "https://bücher.example/ü?ü", "HTTPS://EXAMPLE.COM./"):
        check_url(url, allow)
    for url in ("http://8.8.8.8/", "http://192.168.0.1/"):
        with pytest.raises(InputError, match="operator allows"):
            check_url(url, allow)
    with pytest.raises(InputError, match="not public"):
        check_url("https://192.168.0.1/", allow)


async def test_plain_http_goes_to_allowed_networks_only(tmp_path: Path, plain: Receiver) -> None:
    url = f"http://{NAME}:{plain.port}/"
    assert await failure(Webhooks(tmp_path, HERE, resolve=to("127.0.0.1")), url) is None
    assert "operator allows" in str(await failure(Webhooks(tmp_path, HERE, resolve=to("1.1.1.1")), url))
    assert "https://" in str(await failure(Webhooks(tmp_path, resolve=to("127.0.0.1")), url))
    assert plain.connections == 1


async def test_a_name_that_changes_its_answer_gains_nothing(tmp_path: Path) -> None:
    asked = []

    def rebinding(host: str, port: int) -> Sequence[str]:
        asked.append((host, port))
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    async with receiving() as checked, receiving(host="127.0.0.2", port=checked.port) as other:
        sender = Webhooks(tmp_path, (ip_network("127.0.0.1/32"),), resolve=rebinding)
        assert await failure(sender, f"http://{NAME}:{checked.port}/") is None
        assert asked == [(NAME, checked.port)]
        assert await failure(sender, f"http://{NAME}:{checked.port}/")
        assert (checked.connections, other.connections) == (1, 0)


async def test_another_address_of_the_name_is_tried(tmp_path: Path, plain: Receiver) -> None:
    sender = Webhooks(tmp_path, HERE, resolve=to("127.0.0.9", "127.0.0.1"))
    assert await failure(sender, f"http://{NAME}:{plain.port}/") is None


async def test_the_machine_s_own_resolver(tmp_path: Path, plain: Receiver) -> None:
    assert await failure(Webhooks(tmp_path, HERE), plain.url) is None
    assert await failure(Webhooks(tmp_path, HERE), f"http://localhost:{plain.port}/") is None


def test_allowed_networks_are_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert WorkerSettings().webhook_allow == ()
    monkeypatch.setenv("VELOCITY_WEBHOOK_ALLOW", "10.0.0.0/8, fd00::/8")
    assert WorkerSettings().webhook_allow == (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))
    monkeypatch.setenv("VELOCITY_WEBHOOK_ALLOW", "10.0.0.1/8")
    with pytest.raises(ValueError, match="host bits"):
        WorkerSettings()
