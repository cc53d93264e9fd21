"""rig_core/download.py against a small server on the loopback, and Load Face Parser's entry that uses it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from collections import namedtuple
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from rig_core import download
from rig_core.estimators.parsing import BiSeNet
from tests import node_pack

pack = node_pack.pack
CONTENTS = bytes(torch.randint(256, (3 * download.BLOCK + 77,), generator=torch.Generator().manual_seed(0)))
SHA = hashlib.sha256(CONTENTS).hexdigest()


@dataclass
class Server:
    """What the next answers are like, and what was asked for: (path, Range)."""

    url: str = ""
    contents: bytes = CONTENTS
    ranges: bool = True
    cut: int | None = None
    status: int = 200
    redirect: str = ""
    asked: list = field(default_factory=list)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    about = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            asked = self.headers.get("Range")
            about.asked.append((self.path, asked))
            self.close_connection = True
            if about.redirect or about.status != 200:
                self.send_response(302 if about.redirect else about.status)
                self.send_header("Location", about.redirect)
                self.send_header("Content-Length", "0")
                return self.end_headers()
            first = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and about.ranges else 0
            body = about.contents[first:]
            self.send_response(206 if first else 200)
            if first:
                total = len(about.contents)
                self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if about.cut is None else body[: about.cut])

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    about.url = f"http://127.0.0.1:{http.server_address[1]}/file.bin"
    yield about
    http.shutdown()
    thread.join()
    http.server_close()


def get(server, path, **changed):
    return download.fetch(
        **{"url": server.url, "path": path, "sha256": SHA, "size": len(CONTENTS), **changed}
    )


def test_a_whole_file_with_its_progress(server, tmp_path):
    seen = []
    path = tmp_path / "new" / "file.bin"
    assert get(server, path, progress=lambda *a: seen.append(a)) is True
    assert path.read_bytes() == CONTENTS and os.listdir(path.parent) == ["file.bin"]
    done = [d for d, _ in seen]
    assert done[0] == 0 and done[-1] == len(CONTENTS) and done == sorted(done) and len(done) >= 5
    assert {total for _, total in seen} == {len(CONTENTS)}
    assert server.asked == [("/file.bin", None)]


def test_a_cut_connection_is_resumed_by_the_next_call(server, tmp_path):
    path, first = tmp_path / "file.bin", download.BLOCK + 5
    server.cut = first
    with pytest.raises(download.DownloadError) as e:
        get(server, path, page="https://example.org/models")
    part = tmp_path / "file.bin.part"
    kept = part.stat().st_size
    assert not path.exists() and 0 < kept <= first and part.read_bytes() == CONTENTS[:kept]
    text = str(e.value)
    assert "cut" in text and f"{kept / 1e6:.1f} of {len(CONTENTS) / 1e6:.1f} MB" in text and "\n" not in text
    assert "https://example.org/models" in text and server.url in text and str(tmp_path) in text
    server.cut, seen = None, []
    assert get(server, path, progress=lambda done, _: seen.append(done))
    assert server.asked[1] == ("/file.bin", f"bytes={kept}-") and seen[0] == kept
    assert path.read_bytes() == CONTENTS and not part.exists()


def test_a_server_that_does_not_resume_is_asked_for_all(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(b"x" * 1000)
    server.ranges = False
    assert get(server, tmp_path / "file.bin")
    assert server.asked == [("/file.bin", "bytes=1000-")]
    assert (tmp_path / "file.bin").read_bytes() == CONTENTS


@pytest.mark.parametrize("over", [0, 10])
def test_an_unfinished_file_that_is_as_long_or_longer(server, tmp_path, over):
    (tmp_path / "file.bin.part").write_bytes(CONTENTS + b"x" * over)
    assert get(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENTS
    assert server.asked == ([("/file.bin", None)] if over else [])


@pytest.mark.parametrize("begun", [False, True])
def test_other_contents_are_thrown_away(server, tmp_path, begun):
    if begun:  # of another version of the file
        (tmp_path / "file.bin.part").write_bytes(b"x" * 1000)
    else:
        server.contents = CONTENTS[:-1] + bytes([CONTENTS[-1] ^ 1])
    with pytest.raises(download.DownloadError, match="is not the file .*run it again; or get it from http"):
        get(server, tmp_path / "file.bin")
    assert not os.listdir(tmp_path)


def test_a_page_in_the_place_of_the_file_is_not_begun(server, tmp_path):
    server.contents = b"<html>please log in</html>"
    with pytest.raises(download.DownloadError, match=f"a file of 26 bytes, not of {len(CONTENTS)}"):
        get(server, tmp_path / "file.bin")
    assert not os.listdir(tmp_path)
    (tmp_path / "file.bin.part").write_bytes(CONTENTS[:1000])
    server.contents = CONTENTS + b"longer"
    with pytest.raises(download.DownloadError, match="another part of the file, or of another file"):
        get(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENTS[:1000]


def test_what_the_server_says_is_passed_on(server, tmp_path):
    server.status = 404
    with pytest.raises(download.DownloadError, match="the server says 404.*run it again"):
        get(server, tmp_path / "file.bin")
    assert not os.listdir(tmp_path)


def test_stop_keeps_what_has_come(server, tmp_path):
    path, calls = tmp_path / "file.bin", []

    def stop():
        calls.append(1)
        return len(calls) == 3

    assert get(server, path, stop=stop) is False
    assert not path.exists() and (tmp_path / "file.bin.part").read_bytes() == CONTENTS[: 2 * download.BLOCK]

    class Pressed(Exception):
        pass

    def progress(done, total):
        if done > 2 * download.BLOCK:
            raise Pressed

    with pytest.raises(Pressed):
        get(server, path, progress=progress)
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENTS[: 3 * download.BLOCK]
    assert get(server, path) and path.read_bytes() == CONTENTS


def test_a_file_that_is_there_is_left_alone(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"mine")
    assert get(server, tmp_path / "file.bin") is True
    assert (tmp_path / "file.bin").read_bytes() == b"mine" and not server.asked
    other = tmp_path / "other.bin"  # and one that appears meanwhile

    def progress(done, total):
        if done == total:
            other.write_bytes(b"theirs")

    assert get(server, other, progress=progress)
    assert other.read_bytes() == b"theirs" and sorted(os.listdir(tmp_path)) == ["file.bin", "other.bin"]


def test_no_room_is_said_before_anything_is_asked(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(download.DownloadError, match="it takes 67 MB, 1 MB are free in .*make room"):
        get(server, tmp_path / "file.bin")
    assert not server.asked and not os.listdir(tmp_path)


def test_only_https_is_fetched_also_behind_a_redirect(server, tmp_path):
    for url in (
        "http://example.org/file.bin",
        "ftp://example.org/file.bin",
        "file:///etc/passwd",
        "file.bin",
    ):
        with pytest.raises(ValueError, match="only https"):
            get(server, tmp_path / "file.bin", url=url)
    for target in ("http://example.org/file.bin", "file:///etc/passwd"):
        server.redirect = target
        with pytest.raises(download.DownloadError):
            get(server, tmp_path / "file.bin")
    assert not os.listdir(tmp_path)


def test_no_server_there(tmp_path):
    with pytest.raises(download.DownloadError, match="refused.*run it again; or get it from http"):
        download.fetch("http://127.0.0.1:1/file.bin", tmp_path / "file.bin", SHA, 10)


def test_a_silent_server_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.contents, wait = CONTENTS, threading.Event()
    monkeypatch.setattr(BaseHTTPRequestHandler, "end_headers", lambda self: wait.wait(2))
    with pytest.raises(download.DownloadError, match="timed out"):
        get(server, tmp_path / "file.bin")
    wait.set()


def test_what_is_offered():
    for name, offer in download.OFFERED.items():
        assert offer.url.startswith("https://") and offer.url.endswith("/" + name)
        assert re.fullmatch("[0-9a-f]{64}", offer.sha256) and offer.size > 0 and offer.licence
        assert re.search("/[0-9a-f]{40}/", offer.url)  # of one commit: its bytes stay the same


# ------------------------------------------------------------------------------------ Load Face Parser


@pytest.fixture
def parser(pack, server, monkeypatch, tmp_path_factory):
    """The node, its file offered by the server on the loopback; (name, entry, path)."""
    source = tmp_path_factory.mktemp("parser") / "parser.pth"
    torch.manual_seed(0)
    torch.save({k: v.half() for k, v in BiSeNet().state_dict().items()}, source)
    server.contents = source.read_bytes()
    (name,) = pack.core.download.OFFERED
    offer = replace(
        pack.core.download.OFFERED[name],
        url=server.url,
        size=len(server.contents),
        sha256=hashlib.sha256(server.contents).hexdigest(),
    )
    entry = pack.nodes_module.host.fetch_entry(name)
    monkeypatch.setitem(pack.core.download.OFFERED, name, offer)
    monkeypatch.setattr(pack.nodes_module.host.folders, "fetch_entry", lambda name: entry)
    path = pack.host.folder / "models" / "face_rig" / name
    pack.host.progress.clear()
    yield name, entry, path
    path.unlink(missing_ok=True)
    pack.host.interrupt_after = None


def options(pack):
    return pack.nodes["FaceRig_LoadFaceParser"].define_schema().inputs[0].options


def test_the_entry_fetches_and_loads(pack, server, parser):
    name, entry, path = parser
    node = pack.nodes["FaceRig_LoadFaceParser"]
    assert entry == "download 79999_iter.pth (53 MB, MIT)" and options(pack)[:2] == [name, entry]
    assert node.define_schema().inputs[0].default == name and not server.asked  # never by itself
    before = node.fingerprint_inputs(file=entry)
    assert node.validate_inputs(file=entry) is True and before == node.fingerprint_inputs(file=name)
    (got,) = pack.run("LoadFaceParser", file=entry)
    assert isinstance(got.model, pack.core.estimators.parsing.BiSeNet)
    assert path.read_bytes() == server.contents
    done, total, _ = pack.host.progress[-1]
    assert done == total == len(server.contents) and len(pack.host.progress) > 50
    assert entry not in options(pack) and options(pack)[0] == name
    # one file behind both, and what follows need not run again for the fetch
    assert node.fingerprint_inputs(file=entry) == node.fingerprint_inputs(file=name) == before
    (again,) = pack.run("LoadFaceParser", file=entry)  # a graph that was saved with it
    assert len(server.asked) == 1
    for a, b in zip(got.model.state_dict().values(), again.model.state_dict().values()):
        assert torch.equal(a, b)


def test_stop_in_the_host_keeps_what_has_come(pack, server, parser):
    name, entry, path = parser
    pack.host.interrupt_after = 40
    with pytest.raises(Exception, match="^$") as e:
        pack.run("LoadFaceParser", file=entry)
    assert type(e.value).__name__ == "Interrupted"
    part = path.with_name(name + ".part")
    assert not path.exists() and part.stat().st_size == 39 * download.BLOCK
    pack.host.interrupt_after = None
    pack.run("LoadFaceParser", file=entry)
    assert server.asked[-1][1] == f"bytes={39 * download.BLOCK}-" and path.exists() and not part.exists()


def test_without_a_network_the_error_says_what_to_do(pack, server, parser):
    name, entry, path = parser
    server.status = 503
    with pytest.raises(OSError, match="'file': 79999_iter.pth could not be .* the server says 503") as e:
        pack.run("LoadFaceParser", file=entry)
    assert "zllrunning/face-parsing.PyTorch" in str(e.value) and str(path.parent) in str(e.value)


def test_a_missing_file_is_not_fetched_but_named(pack, server, parser):
    name, entry, path = parser
    said = pack.nodes["FaceRig_LoadFaceParser"].validate_inputs(file=name)
    with pytest.raises(FileNotFoundError) as e:
        pack.run("LoadFaceParser", file=name)
    assert said == str(e.value) and not server.asked
    for word in ("'file'", name, "models/face_rig", str(path.parent), "press R", entry, "optional"):
        assert word in said


def test_another_file_of_that_name_is_another_file(pack, server, parser):
    name, entry, path = parser
    node = pack.nodes["FaceRig_LoadFaceParser"]
    before = node.fingerprint_inputs(file=name)
    path.write_bytes(b"own training")
    assert node.fingerprint_inputs(file=name) == node.fingerprint_inputs(file=entry) != before
