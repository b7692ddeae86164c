"""Where raw data lies: a folder, a .zip, a .tar or .tar.gz, on disk or in S3, seen as files."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from clip_ray.errors import RunError
from clip_ray.storage import Storage, arrow_filesystem

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
_READ_AHEAD_BYTES = 4 * 2**20


@dataclass(frozen=True)
class FileRef:
    """A file, or a member of an archive, that any node can read."""

    container: str  # a local path or an s3:// address
    size_bytes: int
    member: str | None = None
    offset: int | None = None  # of a tar's member

    def read(self) -> bytes:
        """The whole content. Raises OSError, zipfile.BadZipFile or RunError."""
        if self.member is None:
            return _read(self.container)
        if self.offset is None:
            return _zip(self.container, os.getpid()).read(self.member)
        file = _open(self.container, os.getpid())
        file.seek(self.offset)
        return file.read(self.size_bytes)


@dataclass
class Source:
    """The files below a root by their relative path; an archive's members stand below its name."""

    root: str
    files: dict[str, FileRef] = field(default_factory=dict)
    escaped: list[str] = field(default_factory=list)  # members that point out of their archive

    def named(self, name: str) -> str | None:
        """The path of the file called `name`, in whatever folder, the least deep one."""
        found = [path for path in self.files if PurePosixPath(path).name == name]
        return min(found, key=lambda path: path.count("/"), default=None)


def list_files(root: str) -> Source:
    """What lies at `root`, archives unopened. Raises RunError where nothing does."""
    source = Source(root)
    found = _list_s3(root) if root.startswith("s3://") else _list_local(Path(root))
    source.files = dict(found)
    if not source.files:
        raise RunError(f"data.source is {root!r}: nothing is there")
    return source


def open_archives(source: Source, staging: Storage) -> Source:
    """The same files with each archive's members in its place.

    A compressed tar cannot be read at random: it is unpacked to a plain one in `staging` first.
    """
    opened = Source(source.root)
    for path, ref in source.files.items():
        if not path.lower().endswith(ARCHIVES):
            opened.files[path] = ref
            continue
        try:
            members = list(_members(path, ref.container, staging))
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
            raise RunError(f"{ref.container}: cannot be read as an archive: {error}") from None
        for member, member_ref in members:
            if _escapes(member) or member_ref is None:
                opened.escaped.append(f"{path}/{member}")
            else:
                opened.files[f"{path}/{member}"] = member_ref
    return opened


def _list_local(root: Path) -> Iterator[tuple[str, FileRef]]:
    if root.is_file():
        yield root.name, FileRef(str(root.resolve()), root.stat().st_size)
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file():
                ref = FileRef(str(path.resolve()), path.stat().st_size)
                yield path.relative_to(root).as_posix(), ref


def _list_s3(root: str) -> Iterator[tuple[str, FileRef]]:
    bucket, _, prefix = root.removeprefix("s3://").rstrip("/").partition("/")
    storage = Storage(f"s3://{bucket}")
    for key, size_bytes in storage.sizes(prefix):
        below = key.removeprefix(prefix).lstrip("/")
        if key == prefix or key.startswith(f"{prefix}/") or not prefix:
            yield below or PurePosixPath(key).name, FileRef(storage.uri(key), size_bytes)


def _members(path: str, container: str, staging: Storage) -> Iterator[tuple[str, FileRef | None]]:
    """Name and place of each member; None stands for a link, which may point anywhere."""
    if path.lower().endswith(".zip"):
        for entry in _zip(container, os.getpid()).infolist():
            if not entry.is_dir():
                yield entry.filename, FileRef(container, entry.file_size, entry.filename)
        return
    if path.lower().endswith((".tar.gz", ".tgz")):
        container = _unpack(path, container, staging)
    buffered: Any = io.BufferedReader(_from_start(container), _READ_AHEAD_BYTES)  # type: ignore[arg-type]
    with tarfile.open(fileobj=buffered, mode="r:") as tar:
        for entry in tar:
            if entry.isfile():
                yield entry.name, FileRef(container, entry.size, entry.name, entry.offset_data)
            elif not entry.isdir():
                yield entry.name, None
        buffered.detach()


def _unpack(path: str, container: str, staging: Storage) -> str:
    key = path.replace("/", "_") + ".tar"
    if not staging.exists(key):
        with gzip.open(_from_start(container)) as plain:
            staging.upload_stream(plain, key)
    return staging.uri(key)


def _from_start(container: str) -> BinaryIO:
    file = _open(container, os.getpid())
    file.seek(0)
    return file


def _escapes(member: str) -> bool:
    path = PurePosixPath(member.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or ":" in path.parts[0]


def _read(container: str) -> bytes:
    if container.startswith("s3://"):
        root, _, key = container.rpartition("/")
        return Storage(root).read_bytes(key)
    return Path(container).read_bytes()


# A task's process reads many members of few archives: what it opened once, it keeps.
@lru_cache(maxsize=8)
def _open(container: str, pid: int) -> BinaryIO:
    if container.startswith("s3://"):
        return arrow_filesystem().open_input_file(container.removeprefix("s3://"))  # type: ignore[return-value]
    return Path(container).open("rb")


@lru_cache(maxsize=8)
def _zip(container: str, pid: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(_open(container, pid))
