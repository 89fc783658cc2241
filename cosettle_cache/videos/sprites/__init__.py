"""The built-in clips: textured creatures over moving backgrounds, with exact masks, parts and joints.

In come settings, out goes a data root in the public layouts, drawn on demand and kept in the cache folder.
"""

from cosettle_cache.core.settings import SpritesSettings
from cosettle_cache.videos.sprites.root import build_sprites_manifest, ensure_sprites, read_settings

__all__ = ["SpritesSettings", "build_sprites_manifest", "ensure_sprites", "read_settings"]
