"""Fetch a file of known contents: resumed, checked, never over another; `OFFERED` lists what may be fetched.

This is the only module of the pack that speaks to a network, and only where a user has asked for it by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

BLOCK = 2**16  # bytes between two looks at the stop button
TIMEOUT = 20.0  # seconds that a server may be silent
SPARE = 64 * 2**20  # bytes that stay free on the disk
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class DownloadError(OSError):
    """A file that could not be fetched; the message is one line for the user."""


@dataclass(frozen=True)
class Offer:
    """A file that everybody may fetch. url: these very bytes; page: where people find it; size in bytes."""

    url: str
    page: str
    size: int
    sha256: str
    licence: str


OFFERED = {
    "79999_iter.pth": Offer(
        "https://huggingface.co/ManyOtherFunctions/face-parse-bisent/resolve/"
        "0073b233a5a3c4b1377d4dbf49245017938a72b5/79999_iter.pth",
        "https://github.com/zllrunning/face-parsing.PyTorch",
        53_289_463,
        "468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567",
        "MIT",
    ),
}


def fetch(
    url: str,
    path: str | Path,
    sha256: str,
    size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
    page: str = "",
) -> bool:
    """Fetch `size` bytes with this SHA-256 into a file. True when it is there, False when stop() said so.

    A file that is there already is left alone. What has come of an unfinished one is kept in PATH.part, and
    the next call goes on from there. progress(done, total), in bytes, may raise to stop. page: named in
    errors for those who fetch by hand. Raises DownloadError; ValueError for a url that is not https.
    """
    path = Path(path)
    if path.exists():
        return True
    _check(url)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _receive(url, part, size, progress, stop):
            return False
        found = _sha256(part)
        if found != sha256:
            part.unlink()
            raise DownloadError(f"what came is not the file (SHA-256 {found[:16]}..., not {sha256[:16]}...)")
        if path.exists():  # it came another way meanwhile
            part.unlink()
        else:
            os.rename(part, path)
    except (OSError, http.client.HTTPException) as e:
        raise DownloadError(_advice(url, path, part, size, e, page)) from e
    return True


def _check(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
        raise ValueError(f"{url}: only https is fetched")


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        try:
            _check(newurl)
        except ValueError as e:
            raise urllib.error.URLError(f"the server points to {e}") from e
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _receive(url: str, part: Path, size: int, progress, stop) -> bool:
    """Bring the unfinished file to its size."""
    have = part.stat().st_size if part.exists() else 0
    if have > size:
        have = 0
    if have == size:
        return True
    free = shutil.disk_usage(part.parent).free
    if free < size - have + SPARE:
        need, there = (size - have + SPARE) / 1e6, free / 1e6
        raise DownloadError(f"it takes {need:.0f} MB, {there:.0f} MB are free in {part.parent}: make room")
    headers = {"User-Agent": "face-rig", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    opener = urllib.request.build_opener(_Redirects)
    with opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
        have = _start(answer, have, size)
        with open(part, "r+b" if have else "wb") as f:
            f.seek(have)
            progress(have, size)
            while have < size:
                if stop():
                    return False
                block = answer.read(min(BLOCK, size - have))
                if not block:
                    raise DownloadError("the connection was cut")
                f.write(block)
                have += len(block)
                progress(have, size)
            os.fsync(f.fileno())
    return True


def _start(answer, have: int, size: int) -> int:
    """The byte that the answer begins with: `have`, or 0 from a server that does not resume."""
    if answer.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if found and int(found[1]) == have and found[2] in (str(size), "*"):
            return have
        raise DownloadError("the server answers with another part of the file, or of another file")
    length = answer.headers.get("Content-Length")
    if length is not None and int(length) != size:
        raise DownloadError(f"the server has a file of {length} bytes, not of {size}")
    return 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _advice(url: str, path: Path, part: Path, size: int, error: Exception, page: str) -> str:
    """One line: what happened, what is kept, what to do."""
    why = f"the server says {error.code}" if isinstance(error, urllib.error.HTTPError) else ""
    why = why or str(getattr(error, "reason", "") or error) or type(error).__name__
    kept = 0
    with contextlib.suppress(OSError):
        kept = part.stat().st_size
    again = "run it again"
    if kept:
        again += f", it goes on after {kept / 1e6:.1f} of {size / 1e6:.1f} MB"
    by_hand = f"{page} or {url}" if page else url
    return (
        f"{path.name} could not be fetched: {why}. Either {again}; or get it from {by_hand} and put it into "
        f"{path.parent}"
    )
