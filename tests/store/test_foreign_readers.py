"""Strangers read a finished store: zarr-python, tensorstore and dask, without our package or a warning."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from store_cases import Case, frames_case, pairs_case

Reader = Callable[[Path, str], np.ndarray]


def by_zarr(path: Path, name: str) -> np.ndarray:
    import zarr

    group = zarr.open_group(path, mode="r")
    assert {key for key, _ in group.members()} == {"tokens", "index"}
    array = group["tokens"][name]
    assert array.metadata.dimension_names == ("encoding", "row", "col", "channel")
    return array[:]


def by_tensorstore(path: Path, name: str) -> np.ndarray:
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/tokens/{name}"}}
    return tensorstore.open(spec, read=True).result().read().result()


def by_dask(path: Path, name: str) -> np.ndarray:
    import dask.array
    import zarr

    array = zarr.open_array(path, path=f"tokens/{name}", mode="r")
    return dask.array.from_array(array, chunks=array.shards).compute(scheduler="threads", num_workers=2)


@pytest.mark.parametrize("read", [by_zarr, by_tensorstore, by_dask])
@pytest.mark.parametrize("make_case", [pairs_case, frames_case])
def test_same_tokens(read: Reader, make_case: Callable[[], Case], tmp_path: Path) -> None:
    case = make_case()
    path = case.write(tmp_path / "store.zarr")
    for layout in case.plan.arrays:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = read(path, str(layout.grid))
        assert found.dtype == np.float16
        assert np.array_equal(found.view(np.uint16), case.array(layout.grid).view(np.uint16))


def test_the_example_of_the_spec_runs(tmp_path: Path) -> None:
    case = pairs_case()
    page = Path(__file__).parents[2] / "docs" / "store.md"
    code = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    (example,) = (block for block in code if "open_group" in block)
    names: dict[str, object] = {"path": case.write(tmp_path / "store.zarr")}
    exec(example, names)
    assert np.array_equal(names["encoding"], case.array(case.plan.arrays[0].grid)[-1])


def test_index_and_manifest_are_plain_parquet(tmp_path: Path) -> None:
    case = frames_case()
    path = case.write(tmp_path / "store.zarr", failures={"camel": "gone"})
    parts = sorted(path.glob("index/*/*.parquet"))
    rows = [row for part in parts for row in pq.read_table(part, partitioning=None).to_pylist()]
    assert len(rows) == case.plan.n_encodings
    assert {row["video_id"] for row in rows if row["error"] == "gone"} == {"camel"}
    manifest = pq.read_table(path / "index" / "manifest.parquet")
    assert manifest["video_id"].to_pylist() == [video.video_id for video in case.manifest]
