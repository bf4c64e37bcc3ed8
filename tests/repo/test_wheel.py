"""The wheel: files, metadata and entry points."""

import configparser
import email
import stat
import zipfile
from pathlib import Path

from helpers import REPO, tracked_files

from sdlm_megatron import __version__

PACKAGES = ("sdlm_megatron", "data_prep", "checkpoints_tools")
LINKED = ("slurm/", "sdlm_megatron/ops/slurm")
"""Folder of the repository, and the symbolic link that brings its files into the wheel."""


def test_wheel_has_the_tracked_files(wheel: Path) -> None:
    """Every tracked file of the three packages, the files behind the link, and nothing else."""
    tracked = tracked_files()
    expected = {name for name in tracked if name.split("/")[0] in PACKAGES and name != LINKED[1]}
    expected |= {f"{LINKED[1]}/{name.removeprefix(LINKED[0])}" for name in tracked if name.startswith(LINKED[0])}
    info = f"sdlm_megatron-{__version__}.dist-info"
    expected |= {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt")}
    expected.add(f"{info}/licenses/LICENSE")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert names == expected
        assert set(archive.read(f"{info}/top_level.txt").decode().split()) == set(PACKAGES)
        for name in names:
            if name.startswith(LINKED[1]):
                original = REPO / LINKED[0] / name.removeprefix(LINKED[1] + "/")
                assert archive.read(name) == original.read_bytes()
                mode = archive.getinfo(name).external_attr >> 16
                assert bool(mode & stat.S_IXUSR) == bool(original.stat().st_mode & stat.S_IXUSR), name


def test_run_time_data_files_are_included(wheel: Path) -> None:
    """One example of each kind of data file, to detect a rule of the test above that no longer matches."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {
        "checkpoints_tools/hf_code/modeling_sdlm.py",
        "checkpoints_tools/py.typed",
        "data_prep/presets/mixture_3p5m.yaml",
        "data_prep/py.typed",
        "sdlm_megatron/config/presets/sdlm_32b_d4.yaml",
        "sdlm_megatron/diffusion/decode.py",
        "sdlm_megatron/ops/slurm/clusters/example.yaml",
        "sdlm_megatron/ops/slurm/train_32b_d4.sh",
        "sdlm_megatron/py.typed",
        "sdlm_megatron/report/templates/page.css",
    } <= names


def test_metadata_and_entry_points_are_complete(wheel: Path) -> None:
    info = f"sdlm_megatron-{__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(f"{info}/entry_points.txt").decode())
        license_text = archive.read(f"{info}/licenses/LICENSE")
    assert (metadata["Name"], metadata["Version"]) == ("sdlm-megatron", __version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert license_text == (REPO / "LICENSE").read_bytes() and b"Version 2.0, January 2004" in license_text
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert metadata.get_all("Project-URL") and metadata["Summary"]
    assert dict(entry_points["console_scripts"]) == {"sdlm": "sdlm_megatron.cli:entry"}
    assert "sdlm" in entry_points["lm_eval.models"]


def test_version_is_defined_once() -> None:
    places = [
        name
        for name in tracked_files()
        if name.endswith((".py", ".toml", ".cfg")) and f'"{__version__}"' in (REPO / name).read_text(encoding="utf-8")
    ]
    assert places == ["sdlm_megatron/__init__.py"]
    assert f"## [{__version__}]" in (REPO / "CHANGELOG.md").read_text(encoding="utf-8")
