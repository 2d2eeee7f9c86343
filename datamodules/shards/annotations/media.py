"""The folder that annotations name files of: where a name leads, and what lies there."""

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
    """The ending of a file's name in small letters; "" where it is none of a visual."""
    suffix = name.rpartition("/")[2].rpartition(".")[2].lower()
    return suffix if suffix in VISUALS and "." in name.rpartition("/")[2] else ""


@dataclass(frozen=True)
class Media:
    """Files below one folder.

    Args:
        root: the folder.
        follow_links: read symbolic links that lead out of it. Names that do, by `..` or from `/`,
            are refused all the same.
    """

    root: Path
    follow_links: bool = False

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            BadSampleError: unsafe_path, file_missing, file_unreadable.
        """
        try:
            path = self.find(name)
            if path is None:
                raise BadSampleError("file_missing", f"{name}{self._hint(name)}")
            if not path.is_file():  # a named pipe would be waited for
                raise BadSampleError("file_unreadable", f"{name}: no file")
            return path.read_bytes()
        except OSError as error:
            raise BadSampleError("file_unreadable", f"{name}: {error.strerror}") from None

    def frames(self, name: str) -> list[str] | None:
        """Names of the pictures in a folder, as people count; None where there is no such folder.

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
        """Where a name leads. Accented letters may be written either way: macOS takes them apart.

        Raises:
            BadSampleError: unsafe_path, file_unreadable (no name of a file).
        """
        if "\0" in name or not name:
            raise BadSampleError("file_unreadable", f"{name!r} is no name of a file")
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
            what = f"{name} is a symbolic link to {os.path.realpath(path)}, which is not there"
            raise BadSampleError("file_missing", what) from None
        except (OSError, RuntimeError) as error:  # links in a circle
            raise BadSampleError("file_unreadable", f"{name}: {error}") from None
        if not self.follow_links and not target.is_relative_to(self.root.resolve()):
            what = f"{name} is a symbolic link to {target}, outside {self.root}"
            raise BadSampleError("unsafe_path", f"{what}: --follow-links reads it")

    def _hint(self, name: str) -> str:
        """What lies there under nearly the same name."""
        folder, _, file = name.rpartition("/")
        try:
            place = self.find(folder) if folder else self.root
            near = next(_alike(place, file, _loosely), None) if place else None
        except (BadSampleError, OSError):
            return ""
        return f": there is {near!r}" if near else ""


def _alike(folder: Path, name: str, form: Callable[[str], str]) -> Iterator[str]:
    if not folder.is_dir():
        return
    wanted = form(name)
    yield from (file for file in sorted(os.listdir(folder)) if form(file) == wanted)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _loosely(name: str) -> str:
    """Without difference of case and of `%20` and a space."""
    return _composed(unquote(name)).casefold()
