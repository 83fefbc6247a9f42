"""How fast a store of objects is read from here."""

from __future__ import annotations

import time
from collections.abc import Iterator

from litespark.data.storage import is_remote, list_files, open_for_reading
from litespark.errors import LitesparkError
from litespark.metering.doctor.finding import Finding, fine, warning, wrong

_READ_BYTES = 64 << 20
_SLOW_BYTES_PER_SECOND = 50e6


def check_store(url: str) -> Iterator[Finding]:
    """Read up to 64 MiB of an object, or of the first one under a prefix."""
    try:
        if not is_remote(url):
            yield wrong("S3", f"{url} is no s3:// address", "give s3://bucket/key")
            return
        path = url if not url.endswith("/") else list_files(url)[0].path
        started = time.perf_counter()
        with open_for_reading(path) as file:
            size = len(file.read(_READ_BYTES))
        seconds = time.perf_counter() - started
    except IndexError:
        yield warning("S3", f"{url} holds no object", "give a prefix that holds some")
        return
    except (OSError, LitesparkError) as error:
        fix = "look at AWS_ENDPOINT_URL, the credentials and the machine's role"
        yield wrong("S3", f"{url}: {error}", fix)
        return
    seen = f"{path}: {size / 1e6:.0f} MB in {seconds:.2f} s, {size / seconds / 1e6:.0f} MB/s"
    if size / seconds < _SLOW_BYTES_PER_SECOND:
        yield warning("S3", seen, "copy shards to a local disk first: litespark data copy")
    else:
        yield fine("S3", seen)
