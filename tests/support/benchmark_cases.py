"""Tiny data sets in the layouts of DAVIS, VIP and JHMDB, and masks beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from cosettle_cache.videos.masks import write_mask

SIZE = (24, 32)
N_JOINTS = 15


def write_frames(folder: Path, names: list[str], size: tuple[int, int] = SIZE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        Image.fromarray(np.full((*size, 3), 10 * index, np.uint8)).save(folder / name)


def part_map(shift: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[:, 4 + shift : 12 + shift] = 4
    mask[: size[0] // 2, 4 + shift : 8 + shift] = 13
    return mask


def write_vip(root: Path, name: str = "videos1", n_frames: int = 3, labels: str = "Annotations") -> None:
    """One clip whose pairs are numbered as the data set does: from 1, 25 apart, and not always."""
    stems = [f"{number:012d}" for number in (1, 26, 50, 76, 101)[:n_frames]]
    write_frames(root / "Images" / name, [f"{stem}.jpg" for stem in stems])
    folder = root / labels / "Category_ids" / name
    folder.mkdir(parents=True, exist_ok=True)
    for index, stem in enumerate(stems):
        Image.fromarray(part_map(index)).save(folder / f"{stem}.png")


def make_joints(n_frames: int, seed: int = 0) -> np.ndarray:
    """Joints in pixels from 1, as the files have them."""
    start = np.random.default_rng(seed).uniform([[3], [3]], [[28], [20]], (2, N_JOINTS))
    return start[:, :, None] + np.arange(n_frames) * 0.5


def write_jhmdb(root: Path, name: str = "walk/one", n_frames: int = 4, seed: int = 0) -> np.ndarray:
    write_frames(root / "Rename_Images" / name, [f"{index:05d}.png" for index in range(1, n_frames + 1)])
    joints = make_joints(n_frames, seed)
    write_mat(root / "joint_positions" / name / "joint_positions.mat", pos_img=joints)
    return joints


def write_mat(path: Path, **content: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, content)


def write_davis(root: Path, name: str, masks: list[np.ndarray]) -> None:
    """One sequence with these annotations."""
    names = [f"{index:05d}" for index in range(len(masks))]
    write_frames(root / "JPEGImages/480p" / name, [f"{stem}.jpg" for stem in names], masks[0].shape)
    write_masks(root / "Annotations/480p" / name, masks)


def write_masks(folder: Path, masks: list[np.ndarray], suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, mask in enumerate(masks):
        write_mask(folder / f"{index:05d}{suffix}", mask)
