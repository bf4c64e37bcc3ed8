"""Checked reads of files that others wrote: JSON with limits and types, and links that lead out of a folder."""

import errno
import os
import resource
from pathlib import Path
from threading import Thread
from unittest.mock import Mock

import pytest
from helpers import make_dataset

from sdlm_megatron import files, train
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import CheckpointError, DataError, UserError, run_cli
from sdlm_megatron.files import checked, make_folder, own_partial, read_json, read_json_object, regular_file, write_text
from sdlm_megatron.report.page_kit import Page
from sdlm_megatron.weights.resumable_folder import check_out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a"', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b'{"a": "' + b"x" * 2000 + b'"}', "more than the 1,000 that are read"),
    ],
)
def test_hostile_json_is_refused_with_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "run.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json(file, CheckpointError, most_bytes=1000 if b"xx" in content else 1 << 20)
    assert str(file) in caught.value.where


def test_absent_file_and_other_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="run.json is missing"):
        read_json(tmp_path / "run.json", CheckpointError)
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a list, not an object"):
        read_json_object(tmp_path / "run.json", CheckpointError)


@pytest.mark.parametrize("name", ["ENOTCONN", "ESHUTDOWN", "ETIMEDOUT", "EREMOTEIO", "EUCLEAN", "EBADMSG"])
def test_errors_of_a_file_server_name_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    problem = OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
    (tmp_path / "run.json").write_text("{}")
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=problem))
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda argv: read_json(tmp_path / "run.json", CheckpointError))
    error = capsys.readouterr().err
    assert ended.value.code == 1 and f"error: {problem.strerror}\n  where: {tmp_path / 'run.json'}\n" in error


def test_fields_are_checked_for_type_and_range(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    content = {"step": 3, "lr": 1, "yes": True, "text": "3"}
    assert checked(content, "step", int, file, CheckpointError, least=0) == 3
    assert checked(content, "lr", float, file, CheckpointError) == 1
    assert checked(content, "yes", bool, file, CheckpointError) is True
    for key, kind, message in (
        ("yes", int, "yes is true or false .'True'., not a whole number"),
        ("text", int, "text is text .'3'., not a whole number"),
        ("none", int, "the field none is missing"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            checked(content, key, kind, file, CheckpointError)
        assert f"field {key}" in caught.value.where
    with pytest.raises(CheckpointError, match="step is 3, below 4"):
        checked(content, "step", int, file, CheckpointError, least=4)


def test_links_out_of_a_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_text("token")
    (folder / "real.json").write_text("{}")
    os.symlink(tmp_path / "secret", folder / "link.json")
    os.symlink("real.json", folder / "alias.json")
    os.mkfifo(folder / "pipe.json")
    for name in ("real.json", "alias.json"):
        assert regular_file(folder, name, CheckpointError) == folder / name
    for name, message in (
        ("link.json", "leads out of its folder, to .*secret"),
        ("../secret", "leads out of its folder"),
        (str(tmp_path / "secret"), "leads out of its folder"),
        ("pipe.json", "not a regular file"),
        ("none.json", "is missing"),
    ):
        with pytest.raises(CheckpointError, match=message):
            regular_file(folder, name, CheckpointError)


def test_links_of_a_hub_cache_into_its_blobs_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("{}")
    os.symlink("../../blobs/123", snapshot / "config.json")
    assert regular_file(snapshot, "config.json", CheckpointError).read_text() == "{}"
    os.symlink("/etc/passwd", snapshot / "tokenizer.json")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        regular_file(snapshot, "tokenizer.json", CheckpointError)


def test_a_file_is_not_written_through_a_planted_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("before")
    for shared, name in ((False, tmp_path / "report.html.partial"), (True, own_partial(tmp_path / "report.html"))):
        os.symlink("victim", name)
        with pytest.raises(OSError, match="symbolic links"):
            write_text(tmp_path / "report.html", "after", shared=shared)
    assert (tmp_path / "victim").read_text() == "before"


def test_two_writers_of_a_file_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real = tmp_path / "mismatch.txt", os.fsync

    def after_another(handle: int) -> None:
        monkeypatch.setattr(os, "fsync", real)
        other = Thread(target=write_text, args=(file, "other"), kwargs={"shared": True})
        other.start()
        other.join()
        assert file.read_text() == "other"

    monkeypatch.setattr(os, "fsync", after_another)
    write_text(file, "own", shared=True)
    assert file.read_text() == "own" and os.listdir(tmp_path) == ["mismatch.txt"]


def test_the_current_folder_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="the output folder exists already"):
        check_out(Path(), 1)
    with pytest.raises(DataError, match="not a packed dataset"):
        PackedDataset(".")


@pytest.mark.parametrize("out", ["/proc/out", "/proc/a/b", "file", "file/a"])
def test_an_output_folder_that_cannot_be_created_is_a_user_error(
    tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    data = make_dataset(tmp_path / "data", rows=1)
    run = ["--config", "tiny", f"--run_dir={out}", f"--data.path={data}"]
    commands = [lambda: train.main([*run, "--dry-run"]), lambda: Page("x").write(Path(out) / "index.html")]
    if out != "file":
        commands += [lambda: check_out(Path(out), 1), lambda: make_folder(Path(out)), lambda: train.main(run)]
    for command in commands:
        with pytest.raises(UserError, match="cannot be created or written to: (No such file|Not a dir|File exists)"):
            command()
    with pytest.raises(UserError, match="cannot replace a folder"):
        Page("x").write(Path())
    assert sorted(os.listdir()) == ["data", "file"]
    make_folder(Path("new/a"), dry=True)
    assert not Path("new").exists()


def test_few_open_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = iter([(resource.RLIM_INFINITY, 0), (256, 0), (64, 64)])
    monkeypatch.setattr(resource, "getrlimit", lambda kind: next(limits))
    with pytest.raises(UserError, match="may open 64 files, and 256 are needed"):
        while True:
            files.need_open_files()
