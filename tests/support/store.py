"""An object store on this machine: moto's server, which speaks S3 over HTTP."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from litespark.data import storage


@contextmanager
def running_store() -> Iterator[str]:
    """A store where the environment says that it is; its address."""
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "http_proxy", "HTTP_PROXY"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        storage._store.cache_clear()
        yield f"http://{host}:{port}"
    storage._store.cache_clear()
    running.stop()


def empty_bucket(address: str, bucket: str) -> Any:
    """Forget all that the store holds and make a bucket; the store's file system."""
    request = urllib.request.Request(f"{address}/moto-api/reset", method="POST")
    urllib.request.urlopen(request).close()
    filesystem = storage._store()
    filesystem.mkdir(bucket)
    return filesystem
