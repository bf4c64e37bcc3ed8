"""Export and import, killed at any disk write and rerun, produce identical bytes."""

import errno
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers import assert_closed, make_hf
from safetensors.torch import load_file

from checkpoints_tools import hf_to_mcore, mcore_to_hf
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.weights.resumable_folder import OutputFile, PlannedFile, open_partial
from tests.byte_tokenizer import write_folder

HIDDEN = 16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_hf(tmp_path_factory.mktemp("base") / "hf", layers=2, hidden=HIDDEN, ffn=24, heads=2, kv=1, tied=False)
    write_folder(folder, "<text_mask>")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"text_mask_token_id": 259', '"text_mask_token_id": 260'))
    return folder


@pytest.fixture(scope="module")
def checkpoint(base: Path) -> Path:
    out = base.parent / "checkpoint"
    hf_to_mcore.convert(base, out)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def in_child(action: Callable[[], Any]) -> int:
    """Runs the action in a forked process and returns its exit code; -9 if it was killed."""
    child = multiprocessing.get_context("fork").Process(target=action)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def killed_at(moment: int, action: Callable[[], Any], *, writes: bool = False) -> Callable[[], None]:
    """Wraps `action`: SIGKILL just before its `moment`-th call that changes the disk (or writes weights)."""

    def run() -> None:
        torch.set_num_threads(1)
        left = [moment]

        def counted(function: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        os.fsync, os.replace, os.rename = counted(os.fsync), counted(os.replace), counted(os.rename)
        if writes:
            OutputFile.write = counted(OutputFile.write)  # type: ignore[method-assign]
        shutil.rmtree = counted(shutil.rmtree)  # type: ignore[assignment]
        os.unlink = counted(os.unlink)
        action()

    return run


@pytest.mark.parametrize("direction", ["export", "import"])
def test_rerun_after_kill_at_any_point_produces_identical_output(
    base: Path, checkpoint: Path, tmp_path: Path, direction: str
) -> None:
    """Kills once at every point; the rerun reuses the complete files that the killed process left."""

    def convert(out: Path) -> None:
        if direction == "export":
            mcore_to_hf.convert(checkpoint, out, max_shard_bytes=18_000, workers=1)
        else:
            hf_to_mcore.convert(base, out, workers=1, file_bytes=18_000)

    convert(tmp_path / "whole" / "out")
    expected, out = content(tmp_path / "whole" / "out"), tmp_path / "out"
    assert len([name for name in expected if name.endswith((".safetensors", ".distcp"))]) > 2
    moments = 0
    while True:
        moments += 1
        shutil.rmtree(out, ignore_errors=True)
        code = in_child(killed_at(moments, lambda: convert(out)))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert not out.exists() or content(out) == expected, moments  # complete or absent
        convert(out)
        assert content(out) == expected, moments
        assert not out.with_name("out.partial").exists()
    assert moments > 30
    assert content(out) == expected


def test_repeated_kills_still_make_progress(checkpoint: Path, tmp_path: Path) -> None:
    """With two workers, each rerun advances, because complete files are kept."""
    expected, out, runs = tmp_path / "whole" / "out", tmp_path / "out", 0
    mcore_to_hf.convert(checkpoint, expected, max_shard_bytes=8_000)
    while not out.exists():
        runs += 1
        assert runs < 100
        moment = 25 + runs
        export = partial(mcore_to_hf.convert, checkpoint, out, max_shard_bytes=8_000, workers=2)
        in_child(killed_at(moment, export, writes=True))
    assert runs > 2
    assert content(out) == content(expected)


def test_complete_files_are_kept_and_other_work_is_discarded(checkpoint: Path, tmp_path: Path) -> None:
    out, partial_out = tmp_path / "out", tmp_path / "out.partial"

    def export(dtype: str | None) -> None:
        mcore_to_hf.convert(checkpoint, out, max_shard_bytes=8_000, workers=1, dtype=dtype)

    assert in_child(killed_at(60, lambda: export(None), writes=True)) == -signal.SIGKILL
    first = sorted((partial_out / "files").glob("*.safetensors"))
    assert first and len(first) == len(list((partial_out / "done").iterdir()))
    before = {p.name: p.stat().st_mtime_ns for p in first}
    (partial_out / "files" / "stray").write_text("unknown file")
    first[0].write_bytes(first[0].read_bytes()[:-1])  # truncated afterwards
    export(None)
    after = {name: (out / name).stat().st_mtime_ns for name in before}
    assert [name for name in before if after[name] != before[name]] == [first[0].name]
    assert not (out / "stray").exists()
    shutil.rmtree(out)
    assert in_child(killed_at(60, lambda: export(None), writes=True)) == -signal.SIGKILL
    export("bfloat16")  # other options: starts from scratch
    assert {t.dtype for file in out.glob("*.safetensors") for t in load_file(file).values()} == {torch.bfloat16}


def test_second_process_cannot_write_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until OUT.partial is removed, with all of its files closed."""
    out = tmp_path / "out"
    monkeypatch.setattr(Path, "rmdir", lambda folder: (assert_closed(folder), os.rmdir(folder)))
    with open_partial(out, {}, workers=1) as work:
        assert work is not None
        with pytest.raises(CheckpointError, match="another process"), open_partial(out, {}, workers=1):
            pass
        work.finish()
    assert not work.root.exists()
    work.root.mkdir()
    (work.root / "plan.json").write_text("{}")  # as after a kill
    with open_partial(out, {}, workers=1) as done:
        assert done is None
    assert not work.root.exists()
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented")))
    with pytest.raises(CheckpointError, match="file system has no locks"), open_partial(tmp_path / "b", {}, workers=1):
        pass


def test_error_of_the_failing_file_is_reported(tmp_path: Path) -> None:
    def write(name: str) -> Callable[[OutputFile], None]:
        def fill(out: OutputFile) -> None:
            if name == "b":
                raise CheckpointError("b is broken", "b")
            while True:
                out.write(b"x" * 1000)

        return fill

    units = [PlannedFile(name, 1000, write(name)) for name in "abc"]
    with (
        pytest.raises(CheckpointError, match="b is broken"),
        open_partial(tmp_path / "out", {}, workers=2) as work,
    ):
        assert work is not None
        work.write(units, workers=2)
    assert not (tmp_path / "out").exists()
    with (
        pytest.raises(CheckpointError, match="GB are needed"),
        open_partial(tmp_path / "big", {}, workers=1) as work,
    ):
        assert work is not None
        work.write([PlannedFile("a", 1 << 60, write("a"))], workers=1)
