"""The built-in clips: textured creatures over moving backgrounds, with exact masks, parts and joints.

In come settings, out goes a data root in the public layouts (default: in the cache folder). It is drawn once,
whole or not at all, however many processes ask for it.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from cosettle_cache.core.errors import InputError
from cosettle_cache.core.files import make_folder, output_errors, read_json, temporary_name
from cosettle_cache.core.settings import SpritesSettings, cache_folder
from cosettle_cache.core.tables import write_json

#: Raised whenever the drawing changes, so that no number is compared across different pixels.
VERSION = 1
#: Written last: says which clips a folder holds.
_MARK = "sprites.json"
_OTHER = "choose another folder for the sprites clips, or delete this one"


def ensure_sprites(folder: str | Path | None = None, settings: SpritesSettings | None = None) -> Path:
    """Return a data root that holds the sprites clips, after drawing them if they are not there yet.

    `folder` must be new, empty, or hold clips of the same settings; the default lies in the cache folder.
    """
    root = Path(folder) if folder is not None else cache_folder() / f"sprites-v{VERSION}"
    settings = settings or SpritesSettings()
    if not _holds(root, settings):
        _draw_into(root, settings)
    return root


def read_settings(root: Path) -> SpritesSettings:
    """Return the settings of the clips in a folder made by `ensure_sprites`."""
    mark = read_json(root / _MARK)
    if not isinstance(mark, dict) or mark.pop("version", None) != VERSION:
        raise InputError(f"{root} holds sprites clips of another version", wanted=VERSION, hint=_OTHER)
    try:
        return SpritesSettings(**mark)
    except TypeError as error:
        raise InputError(f"{root} holds other sprites clips", found=error, hint=_OTHER) from error


def _holds(root: Path, settings: SpritesSettings) -> bool:
    if (root / _MARK).is_file():
        found, wanted = read_json(root / _MARK), {"version": VERSION, **asdict(settings)}
        if found != wanted:
            raise InputError(f"{root} holds other sprites clips", wanted=wanted, found=found, hint=_OTHER)
        return True
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"{root} holds something else", wanted="a new or empty folder", hint=_OTHER)
    return False


def _draw_into(root: Path, settings: SpritesSettings) -> None:
    """Draw into a temporary folder beside `root` and rename it; of several processes the first one wins."""
    from cosettle_cache.videos.sprites.write import write_sprites

    make_folder(root.parent)
    temporary = temporary_name(root)
    with output_errors(root):
        try:
            write_sprites(temporary, settings)
            write_json(temporary / _MARK, {"version": VERSION, **asdict(settings)})
            temporary.rename(root)
        except OSError:
            if not _holds(root, settings):
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
