"""Files and texts of run directories, which may come from anybody. Imports no torch."""

from pathlib import Path


def inside(folder: Path, name: str) -> Path:
    """Returns `folder / name`.

    Raises:
        ValueError: it is a link that leads out of the folder. What lies there is not the run's to
            show, and not the run's to be written over.
    """
    path = folder / name
    try:
        leads_to = path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        raise ValueError(f"{path} is a link that leads nowhere: remove it") from None
    if not leads_to.is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is a link to {leads_to}, out of its folder: put the file there")
    return path


def printable(text: str) -> str:
    """The text in one line, without characters that a terminal takes for commands."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.splitlines()))
