"""Finds and reads the files that annotations name, below one media folder."""

import os
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from datamodules.errors import BadSampleError
from datamodules.file_names import in_order, is_sidecar
from datamodules.visuals.frames import IMAGE_SUFFIXES, VIDEO_SUFFIXES

VISUALS = VIDEO_SUFFIXES | IMAGE_SUFFIXES


def suffix_of(name: str) -> str:
    """Returns the suffix of a file name in lower case, or "" if it is not one of a visual."""
    suffix = name.rpartition("/")[2].rpartition(".")[2].lower()
    return suffix if suffix in VISUALS and "." in name.rpartition("/")[2] else ""


@dataclass(frozen=True)
class Media:
    """The files below one folder.

    Args:
        root: the folder.
        follow_links: read symbolic links to files outside the folder. Names that leave it, by `..`
            or an absolute path, are always refused.
    """

    root: Path
    follow_links: bool = False

    def read(self, name: str) -> bytes:
        """Returns the bytes of a file.

        Raises:
            BadSampleError: unsafe_path, file_missing, file_unreadable.
        """
        try:
            path = self.find(name)
            if path is None:
                raise BadSampleError("file_missing", f"{name}{self._hint(name)}")
            if not path.is_file():  # for example a named pipe, which would block
                raise BadSampleError("file_unreadable", f"{name}: not a file")
            return path.read_bytes()
        except OSError as error:
            raise BadSampleError("file_unreadable", f"{name}: {error.strerror}") from None

    def frames(self, name: str) -> list[str] | None:
        """Returns the pictures of a folder in natural order, or None if there is no such folder.

        Raises:
            BadSampleError: unsafe_path, video_empty (no picture in it).
        """
        folder = self.find(name)
        if folder is None or not folder.is_dir():
            return None
        files = [file for file in os.listdir(folder) if not is_sidecar(file)]
        frames = [file for file in files if suffix_of(file) in IMAGE_SUFFIXES]
        if not frames:
            shown = ", ".join(in_order(files)[:3]) or "nothing"
            raise BadSampleError("video_empty", f"no picture in the folder {name}: {shown}")
        return [f"{name}/{file}" for file in in_order(frames)]

    def find(self, name: str) -> Path | None:
        """Returns the path of a name, or None if it does not exist.

        Accented letters match in composed and decomposed Unicode form, because macOS decomposes
        them.

        Raises:
            BadSampleError: unsafe_path, file_missing (a link to no file), file_unreadable (not a
                valid file name).
        """
        if "\0" in name or not name:
            raise BadSampleError("file_unreadable", f"{name!r} is not a file name")
        roots = (Path(os.path.abspath(self.root)), self.root.resolve())
        paths = ((root, Path(os.path.normpath(root / name))) for root in roots)
        root, path = next(((r, p) for r, p in paths if p.is_relative_to(r)), (None, None))
        if root is None or path is None:
            raise BadSampleError("unsafe_path", f"{name} is outside {self.root}")
        found = root
        for part in path.relative_to(root).parts:
            exact = found / part
            if not os.path.lexists(exact):
                alike = next(_alike(found, part, _composed), None)
                if alike is None:
                    return None
                exact = found / alike
            found = exact
        self._check_links(name, found)
        return found

    def _check_links(self, name: str, path: Path) -> None:
        try:
            target = path.resolve(strict=True)
        except FileNotFoundError:
            what = f"{name} is a symbolic link to {os.path.realpath(path)}, which does not exist"
            raise BadSampleError("file_missing", what) from None
        except (OSError, RuntimeError) as error:  # a loop of links
            raise BadSampleError("file_unreadable", f"{name}: {error}") from None
        if not self.follow_links and not target.is_relative_to(self.root.resolve()):
            what = f"{name} is a symbolic link to {target}, outside {self.root}"
            raise BadSampleError("unsafe_path", f"{what}: add --follow-links to read it")

    def _hint(self, name: str) -> str:
        """Returns a hint about an existing file with a similar name, or ""."""
        folder, _, file = name.rpartition("/")
        try:
            place = self.find(folder) if folder else self.root
            near = next(_alike(place, file, _loosely), None) if place else None
        except (BadSampleError, OSError):
            return ""
        return f": did you mean {near!r}?" if near else ""


def _alike(folder: Path, name: str, form: Callable[[str], str]) -> Iterator[str]:
    if not folder.is_dir():
        return
    wanted = form(name)
    yield from (file for file in sorted(os.listdir(folder)) if form(file) == wanted)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _loosely(name: str) -> str:
    """Returns a form of the name without case, and with `%20` as a space, for comparison."""
    return _composed(unquote(name)).casefold()
