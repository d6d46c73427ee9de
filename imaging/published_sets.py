"""Download or copy the published image sets, and verify them by SHA-256."""

import hashlib
import io
import math
import os
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, TypeVar

from imaging.folders import is_output
from utils import TEMPORARY_SUFFIX, CommandError, locked, progress_bar, remove_stale_files, show, sync_folder

# For each set, the SHA-256 of what `sha256sum *.bmp` prints in its folder: the hashes and names of all files.
SETS = {
    "91-image": "a0650b24564bf5928a18eae0f33bdd0132bd4d69b918e09ae3e3954943a5e917",
    "Set5": "182f07f3f06e1d9f50e6d72946b0fee603769f37cfe4eae50715db3e0fd01ee0",
}
MIRRORS = (
    "https://github.com/tegg89/SRCNN-Tensorflow/archive/78be1a24697935fc39a3a8cf59a6632264afade7.zip",
    "https://github.com/yytlee/CSCI3290/archive/d55de726406413be35f4f9a73659b20b7e84afe8.zip",
    "http://mmlab.ie.cuhk.edu.hk/projects/SRCNN/SRCNN_train.zip",
)
DATA = Path("data")  # parent folder of the sets
MAX_BYTES = 2**27  # largest archive, and largest total of the images in it
MAX_FILE = 2**20  # bytes; the largest published image has 786,486; larger files are not read
MAX_FILES = 10_000  # images in a folder or archive
MAX_DIRECTORY = 2**20  # bytes of an archive's list of members
TIMEOUT = 15  # seconds without a byte
DEADLINE = 600  # seconds for one mirror

Files = dict[str, bytes]  # file contents by name
Name = TypeVar("Name", bound=PurePath)


def digest(files: Iterable[tuple[str, bytes]]) -> str:
    """Return the digest that SETS lists, from the names and contents of a folder's files, read one at a time."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files}
    lines = (f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    return hashlib.sha256("".join(lines).encode(errors="surrogatepass")).hexdigest()  # names may not be valid UTF-8


def fetch(names: Iterable[str], source: Path | None = None) -> None:
    """Install published sets in data/, each completely or not at all.

    Parameters
    ----------
    names : names in SETS
    source : archive or folder to copy them from (default: the first mirrors that have them)

    Raises
    ------
    CommandError if sets are missing: the others are installed. The reason for each mirror is printed, with its
    address, so that one can be downloaded by hand
    """
    missing, reasons = list(names), []
    for origin in [source] if source else MIRRORS:
        try:
            files = read_bmp_files(download(origin) if isinstance(origin, str) else origin)
        except (CommandError, OSError, HTTPException, ValueError) as error:
            reasons.append(f"{origin}: {getattr(error, 'reason', error)}")
            continue
        sets = find_sets(files, missing)
        install(sets)
        missing = [name for name in missing if name not in sets]
        if not missing:
            return
        hashes = (f"{name} as published (SHA-256 {SETS[name][:12]}…)" for name in missing)
        reasons.append(f"{origin}: no folder in it contains {' or '.join(hashes)}")
    problem = f"cannot fetch {' and '.join(missing)}"
    if source:
        raise CommandError(f"{problem}: {reasons[0]}")
    for reason in reasons:
        show(reason, to_stderr=True)
    raise CommandError(
        f"{problem}; download one of the files above elsewhere, and run `python data.py --from FILE` here"
    )


def download(url: str) -> io.BytesIO:
    """Download a URL within MAX_BYTES, TIMEOUT and DEADLINE."""
    end, content = time.monotonic() + DEADLINE, io.BytesIO()
    with (
        urllib.request.urlopen(url, timeout=TIMEOUT) as response,
        progress_bar(None, url.split("/")[2], "B", unit_scale=True) as bar,
    ):
        bar.total = response.length  # None if the server does not say
        while chunk := response.read(2**16):
            content.write(chunk)
            bar.update(len(chunk))
            if content.tell() > MAX_BYTES:
                raise CommandError(f"larger than {MAX_BYTES >> 20} MiB, refused")
            if time.monotonic() > end:
                raise CommandError(f"timed out after {DEADLINE} seconds")
        if bar.total is not None and content.tell() != bar.total:
            raise CommandError(f"incomplete, {content.tell()} of {bar.total} bytes")
    return content


def read_bmp_files(source: Path | io.BytesIO) -> dict[PurePath, bytes]:
    """Read the .bmp files in a folder or a zip archive, by path, without outputs of super_resolve.py.

    Raise CommandError if it is neither.
    """
    if isinstance(source, Path):
        if source.is_dir():
            files = (file for file in source.rglob("*.bmp") if file.is_file() and not is_output(file))
            sizes = ((file, file.stat().st_size) for file in files)
            return {file: read_start(file.open("rb")) for file in select(sizes, "contains")}
        if not source.is_file():
            raise CommandError("no such archive or folder")
        if source.stat().st_size > MAX_BYTES:
            raise CommandError(f"larger than {MAX_BYTES >> 20} MiB, refused")
    try:
        with source.open("rb") if isinstance(source, Path) else source as file:
            if directory_size(file) > MAX_DIRECTORY:
                raise CommandError("lists too many files, refused")
            with zipfile.ZipFile(file) as archive:
                return read_members(archive)
    except (CommandError, PermissionError):
        raise
    except Exception as error:  # damaged archives raise errors of many types
        raise CommandError(f"not a complete zip archive ({error})") from error


def directory_size(file: IO[bytes]) -> float:
    """Return the size in bytes of a zip archive's list of members, which zipfile reads as a whole, and slowly.

    It is infinite for the format of archives above 4 GiB or 65,535 members, and 0 if there is no list.
    """
    file.seek(-min(file.seek(0, io.SEEK_END), 2**16 + 42), io.SEEK_END)
    before, signature, record = file.read().rpartition(b"PK\5\6")  # a comment of up to 64 KiB follows
    if before[-20:-16] == b"PK\6\7":
        return math.inf
    return int.from_bytes(record[8:12], "little") if signature else 0


def read_members(archive: zipfile.ZipFile) -> dict[PurePath, bytes]:
    members = {PurePosixPath(m.filename): m for m in archive.infolist() if m.filename.endswith(".bmp")}
    members = {name: member for name, member in members.items() if not is_output(name)}
    for name, member in members.items():
        if name.is_absolute() or ".." in name.parts or "\\" in str(name):
            raise CommandError(f"its path {str(name)!r} leads outside, refused")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without a limit
            raise CommandError(f"{name} is not compressed with deflate, refused")
    selected = select(((name, member.file_size) for name, member in members.items()), "unpacks to")
    return {name: read_start(archive.open(members[name])) for name in selected}


def select(sizes: Iterable[tuple[Name, int]], verb: str) -> list[Name]:
    """Return the files that a published set may contain, from sizes in bytes. Raise CommandError if there are many."""
    selected, total = [], 0
    for count, (name, size) in enumerate(sizes, 1):
        total += size
        if total > MAX_BYTES or count > MAX_FILES:
            limit = f"{MAX_BYTES >> 20} MiB" if total > MAX_BYTES else f"{MAX_FILES:,} images"
            raise CommandError(f"{verb} more than {limit}, refused")
        if size <= MAX_FILE:
            selected.append(name)
    return selected


def read_start(file: IO[bytes]) -> bytes:
    """Read and close a file, which may be larger than it says."""
    with file:
        return file.read(MAX_FILE)


def find_sets(files: dict[PurePath, bytes], names: list[str]) -> dict[str, Files]:
    """Return the published sets that are among files, whatever their folders are called."""
    folders: dict[PurePath, Files] = {}
    for file, content in files.items():
        folders.setdefault(file.parent, {})[file.name] = content
    found = {digest(folder.items()): folder for folder in folders.values()}
    return {name: found[SETS[name]] for name in names if SETS[name] in found}


def install(sets: dict[str, Files]) -> None:
    """Write sets to data/, each to a temporary folder that is renamed when it is complete."""
    for name, files in sets.items():
        target = DATA / name
        try:
            DATA.mkdir(exist_ok=True)
            sync_folder(DATA.parent)
            remove_stale_files(DATA)
            folder = tempfile.TemporaryDirectory(TEMPORARY_SUFFIX, f".{name}-", DATA, ignore_cleanup_errors=True)
            with folder as temporary, locked(Path(temporary)):
                part = Path(temporary, name)
                part.mkdir()
                for file, content in files.items():
                    with part.joinpath(file).open("wb") as opened:
                        opened.write(content)
                        opened.flush()
                        os.fsync(opened.fileno())
                sync_folder(part)
                if not target.exists():  # another process may have been faster
                    os.replace(part, target)
                    sync_folder(DATA)
        except OSError as error:
            raise CommandError(f"cannot write {target}: {error.strerror}") from error
        show(f"{target}: {len(files)} images, as published")
