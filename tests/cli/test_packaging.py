"""What the wheel holds and says: recipes and lists by name without a checkout; versions agree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import cosettle_cache
from cosettle_cache.cli import run_command
from cosettle_cache.core.files import our_files

ROOT = Path(cosettle_cache.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_a_wheel_finds_its_recipes_and_lists_by_name(tmp_path: Path) -> None:
    """The folders lie as the build lays them, far from the checkout."""
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    ours = shutil.ignore_patterns("__pycache__")
    for folder in wheel["only-include"]:
        shutil.copytree(ROOT / folder, tmp_path / wheel["sources"].get(folder, folder), ignore=ours)
    (tmp_path / "work").mkdir()

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cosettle_cache.cli", *words]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(
            command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True, check=False
        )

    planned, shown = run("run", "sprites", "--dry-run"), run("manifest", "show", "vip_val")
    assert planned.returncode == shown.returncode == 0
    assert "$ cosettle-cache propagate --task sprites" in planned.stderr
    assert "50 videos" in shown.stdout
    missing = run("run", "sprite")
    assert missing.returncode == 3
    assert "sprite does not exist" in missing.stderr and "sprites, vit_tiny_davis" in missing.stderr


def test_a_file_goes_before_a_name_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit_tiny_davis").mkdir()  # a folder is no recipe, and in nobody's way
    (tmp_path / "sprites").write_text("title = 'mine'\n[[step]]\ncommand = 'doctor'\n")
    (tmp_path / "mine").mkdir()
    codes = [run_command(["run", name, "--dry-run"]) for name in ("sprites", "vit_tiny_davis", "mine")]
    said = capsys.readouterr().err
    assert codes == [0, 0, 3]
    assert said.startswith("mine\n") and "ViT-Tiny on real video" in said
    assert "error: mine is not a file" in said


def test_every_recipe_and_list_is_ours() -> None:
    assert {"sprites", "vit_tiny_davis"} <= our_files("pipelines/*.toml").keys()
    assert {"davis2017_val", "vip_val"} <= our_files("data_manifests/*.parquet").keys()


def test_versions_are_the_same_everywhere() -> None:
    project = PROJECT["project"]
    pythons = re.findall(
        r"^Programming Language :: Python :: (3\.\d+)$", "\n".join(project["classifiers"]), re.M
    )
    assert project["requires-python"] == f">={pythons[0]}"
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    (job,) = workflow["jobs"].values()
    matrix = job["strategy"]["matrix"]
    assert matrix["python"] == pythons
    assert {row["python"] for row in matrix["include"]} <= {*pythons}
    assert job["steps"][-1]["run"] == "make test PYTHON=python${{ matrix.python }}"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"] == cosettle_cache.__version__
    assert citation["license"] == project["license"]
    (paper,) = citation["references"]
    bibtex = re.search(r"```bibtex\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert bibtex is not None
    for word in (paper["url"], paper["title"], *(author["family-names"] for author in paper["authors"])):
        assert word in bibtex[1]
    assert paper["url"] in project["urls"].values()
