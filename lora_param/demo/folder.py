"""The demo's own folder: made, or made anew, and never somebody else's."""

from __future__ import annotations

from pathlib import Path

from lora_param.errors import OutputError

__all__ = ["MARKER", "prepare_folder"]

MARKER = ".lora-param-demo"


def prepare_folder(folder: Path) -> None:
    """Make the folder, or take it where it is empty or an earlier demo's.

    Raises:
        OutputError: it is something else, or cannot be written.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(folder, "it is a file; the demo needs a folder of its own")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
            raise OutputError(
                folder,
                "it holds files that the demo did not write; name a new folder, or an empty one",
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).write_text("made by lora-param demo, which may overwrite it\n", "utf-8")
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(folder, error.strerror or str(error)) from None
