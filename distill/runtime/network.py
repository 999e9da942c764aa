"""Finds out at once that there is no network, where the hub's clients would try for a minute.

JAX is not imported here, so that verbs that only read files start quickly.
"""

import functools
import os
import socket
import sys
import urllib.parse
import urllib.request

_TIMEOUT_SECONDS = 5.0


@functools.cache
def find_hub() -> None:
    """If the hub cannot be reached, tells its clients to read what they have cached; they then
    refuse at once what they have not. A proxy is left to them."""
    address = urllib.parse.urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE") or urllib.request.getproxies() or not address.hostname:
        return
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), _TIMEOUT_SECONDS).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when they are imported
        for name in ("huggingface_hub.constants", "datasets.config"):
            if name in sys.modules:
                sys.modules[name].HF_HUB_OFFLINE = True  # pyright: ignore[reportAttributeAccessIssue]
