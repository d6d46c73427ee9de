"""Downloads from a local server, and local copies, of two small sets in place of the published ones."""

import http.server
import io
import os
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_one_line, in_new_process, peak_memory_mib

from imaging import published_sets
from utils import TEMPORARY_SUFFIX, CommandError

NAMES = ["91-image", "Set5"]
rng = np.random.default_rng(0)
FILES = {name: {f"t{i}.bmp": b"BM" + rng.bytes(600) for i in range(2)} for name in NAMES}


@pytest.fixture(autouse=True)
def _small_sets(monkeypatch):
    """The digests of the real sets are tested in test_data.py and test_train.py."""
    digests = {name: published_sets.digest(files.items()) for name, files in FILES.items()}
    monkeypatch.setattr(published_sets, "SETS", digests)
    monkeypatch.setattr(published_sets, "MAX_BYTES", 2**20)
    monkeypatch.setattr(published_sets, "MAX_DIRECTORY", 10_000)
    monkeypatch.setattr(published_sets, "TIMEOUT", 1)


def archive(files=FILES, further="repo-1/Test/other.bmp"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        for folder, name in (("repo-1/Train/", "91-image"), ("repo-1/Test/Set5/", "Set5")):
            for file, content in files[name].items():
                zipped.writestr(folder + file, content)
        zipped.writestr(further, b"BM another image", zipfile.ZIP_STORED)
        zipped.writestr("repo-1/README.md", "hello")
    return buffer.getvalue()


GOOD = archive()
SPOILT = archive({name: files | {"t1.bmp": b"BM something else"} for name, files in FILES.items()})
ONLY = {name: archive({key: {} for key in NAMES} | {name: FILES[name]}) for name in NAMES}  # archives of one set
ENTRIES = io.BytesIO()
with zipfile.ZipFile(ENTRIES, "w") as zipped:
    for letter in "abcdefghijklmnopqrstuvwxyz":
        zipped.writestr(letter * 500, b"")
BAD_ARCHIVES = {
    "long list of members": (ENTRIES.getvalue(), "lists too many files"),
    "long list of members in ZIP64": (
        GOOD.replace(b"PK\5\6", b"PK\6\7" + bytes(16) + b"PK\5\6"),
        "lists too many files",
    ),
    "garbage": (b"<html>Please log in</html>", "not a complete zip archive"),
    "bit-flip": (GOOD[:200] + bytes([GOOD[200] ^ 1]) + GOOD[201:], "not a complete zip archive"),
    "above": (archive(further="repo-1/../../../evil.bmp"), "leads outside"),
    "absolute": (archive(further="/tmp/evil.bmp"), "leads outside"),
    "backslashes": (archive(further="..\\evil.bmp"), "leads outside"),
    "bomb": (archive({"91-image": {"bomb.bmp": bytes(2**22)}, "Set5": {}}), "unpacks to more than 1 MiB"),
}


@pytest.fixture
def web():
    """Serve good and misbehaving downloads; return a function from their names to URLs."""
    bodies = {"good": GOOD, "cut": GOOD[: len(GOOD) // 2], "stall": b"", "large": bytes(2**21), "spoilt": SPOILT} | ONLY
    finished = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.strip("/")
            if name not in bodies:
                return self.send_error(404)
            self.send_response(200)
            if name != "large":  # sent without its size
                self.send_header("Content-Length", str(len(GOOD if name in ("cut", "stall") else bodies[name])))
            self.end_headers()
            self.wfile.write(bodies[name])
            if name == "stall":
                finished.wait(60)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # clients that hang up are expected
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield lambda name: f"http://127.0.0.1:{server.server_address[1]}/{name}"
    finished.set()
    server.shutdown()
    server.server_close()


def write(sets, parent):
    """Write {folder: {file: content}}."""
    for name, files in sets.items():
        folder = parent / name
        folder.mkdir(parents=True)
        for file, content in files.items():
            folder.joinpath(file).write_bytes(content)


def installed():
    """Return the contents of data/: {folder: {file: content}}."""
    return {folder.name: {f.name: f.read_bytes() for f in folder.iterdir()} for folder in Path("data").glob("*")}


def test_command_downloads_both_sets(web, cli, monkeypatch):
    monkeypatch.setattr(published_sets, "MIRRORS", (web("good"),))
    assert cli("data.py") == (0, "data/91-image: 2 images, as published\ndata/Set5: 2 images, as published\n", "")
    assert installed() == FILES


def test_command_skips_existing_sets(cli, monkeypatch):
    monkeypatch.setattr(published_sets, "MIRRORS", ())
    write(FILES, Path("data"))
    Path(f"data/.Set5-abc{TEMPORARY_SUFFIX}").mkdir()  # left by a killed download; it is removed
    found = "data/91-image already exists\ndata/Set5 already exists\n"
    assert cli("data.py") == (0, found, "")
    unused = "WARNING: nowhere was not read, since data/ has folders for all sets\n"
    assert cli("data.py", "--from=nowhere") == (0, found, unused)
    assert installed() == FILES


@pytest.mark.parametrize("content", [{}, {"t0.bmp": b"", "t1.bmp": b""}, {"mine.png": b"mine"}], ids=len)
def test_command_keeps_and_names_folder_with_other_content(web, cli, monkeypatch, content):
    """Power lost during a copy may leave empty files."""
    monkeypatch.setattr(published_sets, "MIRRORS", (web("good"),))
    write({"91-image": content}, Path("data"))
    status, out, err = cli("data.py")
    assert (status, out) == (1, "data/Set5: 2 images, as published\n")
    assert_one_line(err, "error: not the published sets: data/91-image; ", "move or delete")
    assert installed() == FILES | {"91-image": content}


def test_files_are_synced_before_the_set_appears(local_copy, monkeypatch):
    calls, replace = [], os.replace

    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert path.is_dir() or path.read_bytes() == FILES["Set5"][path.name]
        calls.append(path.name)

    def rename(source, target):
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    published_sets.fetch(["Set5"], local_copy)
    here, *files, folder, renamed, parent = calls
    assert (here, sorted(files), folder, renamed, parent) == (
        Path.cwd().name,
        [*FILES["Set5"]],
        "Set5",
        "rename",
        "data",
    )


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("cut", f"incomplete, {len(GOOD) // 2} of {len(GOOD)} bytes"),
        ("large", "larger than 1 MiB"),
        ("missing", "Not Found"),
        ("stall", "timed out"),
        ("spoilt", "no folder in it contains 91-image as published (SHA-256 "),
    ],
)
def test_bad_download_leaves_nothing_and_next_mirror_is_used(web, monkeypatch, capfd, path, reason):
    monkeypatch.setattr(published_sets, "MIRRORS", (web(path),))
    with pytest.raises(
        CommandError, match=r"^cannot fetch 91-image and Set5; .* run `python data\.py --from FILE` here$"
    ):
        published_sets.fetch(NAMES)
    assert_one_line(capfd.readouterr().err, f"{web(path)}: {reason}")  # with the address, for a download by hand
    assert not os.listdir()
    monkeypatch.setattr(published_sets, "MIRRORS", (web(path), web("good")))
    published_sets.fetch(NAMES)
    assert installed() == FILES


def test_slow_download_is_abandoned(web, monkeypatch):
    monkeypatch.setattr(published_sets, "DEADLINE", 0)
    with pytest.raises(CommandError, match="timed out after 0 seconds"):
        published_sets.download(web("good"))


def test_sets_may_come_from_two_mirrors(web, monkeypatch, capfd):
    monkeypatch.setattr(published_sets, "MIRRORS", (web("Set5"), web("missing"), web("91-image")))
    published_sets.fetch(NAMES)
    assert installed() == FILES
    assert capfd.readouterr().err == ""


def test_two_local_archives_with_one_set_each_are_combined(cli):
    for name in NAMES:
        Path(f"{name}.zip").write_bytes(ONLY[name])
    status, out, err = cli("data.py", "--from", "Set5.zip")
    assert (status, out) == (1, "data/Set5: 2 images, as published\n")
    assert_one_line(err, "error: cannot fetch 91-image: Set5.zip: no folder in it contains 91-image as published (SHA-")
    assert cli("data.py", "--from", "91-image.zip")[::2] == (0, "")
    assert installed() == FILES


def test_local_error_is_not_blamed_on_a_mirror(web, monkeypatch):
    Path("data").write_text("in the way")
    monkeypatch.setattr(published_sets, "MIRRORS", (web("good"), web("missing")))
    with pytest.raises(CommandError, match=r"^cannot write data/91-image: File exists$"):
        published_sets.fetch(NAMES)


def test_existing_set_is_kept():
    Path(f"data/.Set5-abc{TEMPORARY_SUFFIX}/Set5").mkdir(parents=True)  # left by a killed download; it is removed
    for folder in ("Set5", ".91-image-backup"):  # the user's own
        Path("data", folder).mkdir()
        Path("data", folder, "mine.png").write_text("mine")
    Path("copy.zip").write_bytes(GOOD)
    published_sets.fetch(NAMES, Path("copy.zip"))
    own = {"mine.png": b"mine"}
    assert installed() == {"91-image": FILES["91-image"], "Set5": own, ".91-image-backup": own}


@pytest.fixture
def local_copy():
    write(FILES, Path("copy/deep"))
    return Path("copy")


def test_folder_is_accepted_as_local_copy(local_copy):
    published_sets.fetch(NAMES, local_copy)
    assert installed() == FILES


def test_outputs_beside_images_of_a_local_copy_are_ignored(local_copy):
    Path("copy/deep/Set5/t0_srcnn_x3.bmp").write_bytes(b"BM" + bytes(2**21))  # more than all images may have
    published_sets.fetch(["Set5"], local_copy)
    Path("copy.zip").write_bytes(archive(further="repo-1/Train/t0_srcnn_x3.bmp"))
    published_sets.fetch(["91-image"], Path("copy.zip"))
    assert installed() == FILES


def test_local_copy_with_other_content_is_refused(local_copy):
    Path("copy/deep/Set5/t0.bmp").write_bytes(b"BM something else")
    with pytest.raises(CommandError, match=r"^cannot fetch Set5: copy: no folder in it contains Set5"):
        published_sets.fetch(["Set5"], local_copy)


def test_local_copy_may_have_names_that_are_not_utf8(local_copy):
    Path("copy", os.fsdecode(b"\xff.bmp")).write_bytes(b"BM")
    published_sets.fetch(["Set5"], local_copy)
    assert installed() == {"Set5": FILES["Set5"]}


@pytest.mark.parametrize(
    ("limit", "value", "reason"), [("MAX_BYTES", 100, "more than 0 MiB"), ("MAX_FILES", 3, "more than 3 images")]
)
def test_large_folder_is_not_read(local_copy, monkeypatch, limit, value, reason):
    monkeypatch.setattr(published_sets, limit, value)
    monkeypatch.setattr(Path, "open", None)
    with pytest.raises(CommandError, match=f"copy: contains {reason}, refused$"):
        published_sets.fetch(["Set5"], local_copy)


def test_large_archive_is_not_read():
    with open("copy.zip", "wb") as file:
        file.write(GOOD)
        file.truncate(2**33)
    with pytest.raises(CommandError, match=r"copy\.zip: larger than 1 MiB, refused$"):
        published_sets.fetch(NAMES, Path("copy.zip"))


def lying_archive(method):
    """Return an archive of one image, of 128 MiB, that is said to have 10 bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as zipped:
        with zipped.open("Set5/t0.bmp", "w", force_zip64=False) as member:
            for _ in range(128):
                member.write(bytes(2**20))
        zipped.infolist()[0].file_size = 10
    return buffer.getvalue()


def memory_to_refuse(paths):
    """Return the reasons for which a new process refuses archives, and how many MiB that takes."""
    before, reasons = peak_memory_mib(), []
    for path in paths:
        with pytest.raises(CommandError) as refusal:
            published_sets.fetch(["Set5"], path)
        reasons.append(str(refusal.value))
    return reasons, peak_memory_mib() - before


def test_lying_archives_take_little_memory(tmp_path):
    paths = [tmp_path / name for name in ("deflate.zip", "bzip2.zip")]
    for path, method in zip(paths, (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2), strict=True):
        path.write_bytes(lying_archive(method))
    reasons, mib = in_new_process(memory_to_refuse, paths)
    assert "CRC" in reasons[0]
    assert "is not compressed with deflate" in reasons[1]
    assert mib < 64


@pytest.mark.parametrize(("content", "reason"), BAD_ARCHIVES.values(), ids=BAD_ARCHIVES)
def test_bad_archive_leaves_nothing(content, reason):
    Path("copy.zip").write_bytes(content)
    with pytest.raises(CommandError, match=f"^cannot fetch 91-image and Set5: copy.zip: .*{reason}"):
        published_sets.fetch(NAMES, Path("copy.zip"))
    assert os.listdir() == ["copy.zip"]


@pytest.mark.parametrize("source", ["nowhere.zip", "pipe.zip"])
def test_source_that_is_not_a_file_or_folder_is_refused(cli, source):
    os.mkfifo("pipe.zip")  # opening it would block
    status, out, err = cli("data.py", "--from", source)
    assert (status, out) == (1, "")
    assert_one_line(err, f"{source}: no such archive or folder")
