"""Files under a URL, through fsspec; what goes wrong there, in one line.

Endpoint and credentials are found where fsspec's client looks for them; for S3 the environment
(``AWS_ENDPOINT_URL_S3``, ``AWS_ACCESS_KEY_ID``, ...), ``~/.aws`` and fsspec's own configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ldm.errors import UserError, is_full
from ldm.progress import progress

Item = TypeVar("Item")

AT_ONCE = 4
"""Files on their way."""
PART = 2**24
"""Bytes of a larger file that are sent at a time."""


class Bucket:
    """The files under a URL, by name; the client tries again by itself, a bounded number of times.

    All methods raise :class:`UserError` when the store cannot be reached or refuses, and
    :class:`FileNotFoundError` when there is no such file or bucket.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url
        # One request a file at a time and small parts, or s3fs holds 500 MB of each file.
        s3 = url.startswith("s3://")
        options = {"max_concurrency": 1} if s3 else {}
        self._sending = {"chunksize": PART} if s3 else {}
        try:
            self._files, self._root = url_to_fs(url, use_listings_cache=False, **options)
        except (ImportError, ValueError) as error:
            raise UserError(f"{url}: {error}; write s3://BUCKET/FOLDER") from error

    def read(self, name: str) -> bytes:
        """A small file's bytes."""
        with _told(f"{self.url}/{name}"):
            return bytes(self._files.cat_file(f"{self._root}/{name}"))

    def write(self, name: str, content: bytes) -> None:
        """Put a small file; S3 shows the one before it until this is whole."""
        with _told(f"{self.url}/{name}"):
            self._files.pipe_file(f"{self._root}/{name}", content)

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each file below a folder, by its name in there; none if there is no folder."""
        root = f"{self._root}/{folder}"
        with _told(f"{self.url}/{folder}"):
            found = self._files.find(root, detail=True)
        return {path.removeprefix(f"{root}/"): int(file["size"]) for path, file in found.items()}

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file here, not whole until this returns."""
        with _told(f"{self.url}/{name}"):
            self._files.get_file(f"{self._root}/{name}", str(path))

    def send(self, path: Path, name: str) -> None:
        """Copy a file there; S3 shows it when it is whole.

        A killed one may leave parts of a large file that nobody sees but who pays for the bucket: a
        lifecycle rule for incomplete multipart uploads deletes them.
        """
        with _told(f"{self.url}/{name}"):
            self._files.put_file(str(path), f"{self._root}/{name}", **self._sending)

    def delete(self, names: Sequence[str]) -> None:
        """Delete files."""
        with _told(self.url):
            self._files.rm([f"{self._root}/{name}" for name in names])


def each(work: Callable[[Item], object], items: Sequence[Item], what: str) -> None:
    """Do the work of all files, some at once; the first error ends it."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [pool.submit(work, item) for item in items]
        try:
            for job in progress(as_completed(jobs), what, len(jobs), "files", shown=bool(jobs)):
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _told(url: str) -> Iterator[None]:
    """A store's errors in the user's terms."""
    from botocore.exceptions import BotoCoreError

    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url}: no such file or bucket") from error
    except (BotoCoreError, OSError, ValueError) as error:
        says = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{url}: {says.rstrip('.')}; {_remedy(error)}") from error


def _remedy(error: Exception) -> str:
    from botocore.exceptions import NoCredentialsError, PartialCredentialsError

    if isinstance(error, (PermissionError, NoCredentialsError, PartialCredentialsError)):
        return "give credentials that may (AWS_ACCESS_KEY_ID and the like, or ~/.aws)"
    if is_full(error):
        return "make room and run it again, it goes on"
    return "see to the endpoint (AWS_ENDPOINT_URL_S3) and run it again, it goes on"
