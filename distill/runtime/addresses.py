"""Addresses of servers, and the tokens that they want: what may be written down, and what may not.

JAX is not imported here, so that verbs that only read files start quickly.
"""

import contextlib
import ipaddress
import os
import re
import urllib.parse

from distill.runtime import paths
from models.errors import UserError


def is_url(path: str) -> bool:
    """Returns True if a path is the address of a server, or of several."""
    return path.lower().startswith(("http://", "https://"))


def split_urls(text: str) -> tuple[str, ...]:
    """Splits addresses that are separated by commas."""
    return tuple(url.strip() for url in text.split(","))


def read_url(url: str) -> str:
    """Returns the base URL of a server: without a slash at its end, and without /v1.

    Raises:
      UserError: if it is none, or holds credentials, which would be written to files.
    """
    paths.refuse_credentials(url, "URL")
    try:
        parts = urllib.parse.urlsplit(url)
        is_valid = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number, or an address that is no IPv6 address
        is_valid, parts = False, urllib.parse.urlsplit("")
    if not is_valid or parts.scheme.lower() not in ("http", "https") or re.search(r"\s", url):
        shown = re.sub(r"//.*@", "//***@", url)
        raise UserError(
            f"{shown}: no address of a server, which is http://HOST:PORT or https://HOST"
        )
    if parts.username is not None or parts.query or parts.fragment:
        raise UserError(
            f"{parts.scheme}://{parts.hostname}: an address has no user, query or fragment; a "
            "token comes from an environment variable (api_key_env)"
        )
    base = url.rstrip("/").removesuffix("/v1").rstrip("/")
    return parts.scheme.lower() + base[len(parts.scheme) :]


def read_token(api_key_env: str) -> str:
    """Returns the bearer token in an environment variable; "" without a name.

    Raises UserError if the variable is missing or empty, or holds what no header can.
    """
    if not api_key_env:
        return ""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", api_key_env):
        raise UserError(
            "api_key_env: is no name of an environment variable; the token itself does not belong "
            "in a command or a config"
        )
    token = os.environ.get(api_key_env, "").strip()
    if not token:
        raise UserError("api_key_env: names an environment variable that is not set, or is empty")
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError(f"api_key_env={api_key_env}: holds characters that no token has")
    return token


def is_loopback(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
