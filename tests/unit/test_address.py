"""Base URLs: one server has one canonical form, and what is no base URL is told with what to write."""

import pytest

from seer_async.address import canonical, require_distinct
from seer_async.errors import UsageError


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8393/", "http://localhost:8393", "HTTP://LocalHost:8393//", "http://[::1]:8393"],
)
def test_ways_to_write_one_server(url: str) -> None:
    assert canonical(url) == "http://127.0.0.1:8393"
    with pytest.raises(UsageError) as raised:
        require_distinct(["http://127.0.0.1:8393", "http://127.0.0.1:8394", url])
    assert str(raised.value) == f"http://127.0.0.1:8393 and {url} are the same server: give it once"


def test_different_servers() -> None:
    urls = ["http://a:1", "http://a:2", "http://b:1", "https://a:1", "http://a:1/gpu0", "http://a:1/gpu1", "http://a"]
    require_distinct(urls)
    with pytest.raises(UsageError, match="same server"):
        require_distinct([*urls, "http://a:80"])


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("127.0.0.1:8391", "starts with http://"),
        ("localhost:8391", "starts with http://"),
        ("ftp://a:1", "starts with http://"),
        ("http://", "starts with http://"),
        ("http://a b:1", "starts with http://"),
        ("http://a:port", "is no URL"),
        ("http://a:1/v1", "without /v1"),
        ("http://a:1/v1/", "without /v1"),
        ("http://a:1/x/v1/completions", "without /v1"),
        ("http://a:1?model=m", "without /v1 or a query"),
    ],
)
def test_what_is_no_base_url(url: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as raised:
        canonical(url)
    assert "like http://10.0.0.1:8000" in str(raised.value)
    assert repr(url) in str(raised.value)
