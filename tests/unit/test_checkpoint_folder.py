"""Names and files of a run's checkpoints: what belongs to the run, and content that is damaged or hostile."""

import errno
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import failing_open

from sdlm_megatron.checkpoint import restore
from sdlm_megatron.checkpoint.local_disk import _listing, carry_over, keep_only, local_root
from sdlm_megatron.checkpoint.restore import damage
from sdlm_megatron.config.schema import CheckpointConfig, DiffusionConfig, ModelConfig
from sdlm_megatron.errors import CheckpointError, ReplicaError, UnreadableError
from sdlm_megatron.files import HashedFile
from sdlm_megatron.weights import checkpoint_folder
from sdlm_megatron.weights.checkpoint_folder import (
    TrainState,
    check_complete,
    check_files,
    checksums,
    find_checkpoint,
    newest,
    newest_step,
    prune,
    read_run,
    read_state,
    step_folder,
)

SHAPE = ModelConfig(2, 64, 96, 4, 2, 16, 264)


def save(run: Path, step: int, **changes: Any) -> Path:
    """A complete checkpoint without weights."""
    folder = step_folder(run, step)
    folder.mkdir(parents=True)
    values = {"shape": SHAPE, "diffusion": DiffusionConfig(4, False, True, 0.0, "<m>"), "dataset": {}, **changes}
    state = TrainState(step, step * 4, 4, mask_token_id=259, precision="fp32", with_optimizer=True, **values)
    (folder / "state.json").write_text(json.dumps(asdict(state)))
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """Writes complete.json for the files that are there."""
    (folder / "complete.json").unlink(missing_ok=True)
    (folder / "complete.json").write_text(json.dumps(checksums(folder)))


FOREIGN = (
    *("step-0000003-good", "step-3", "step-", "step-x", "step-0000003.old", ".step-0000003", "step-0000003-a.partial"),
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of steps 2 and 3 among names that the run did not write."""
    folder = save(tmp_path, 2)
    save(tmp_path, 3)
    for name in FOREIGN:
        shutil.copytree(folder, folder.with_name(name))
    folder.with_name("step-0000009").write_text("a file")
    folder.with_name("step-0000008").symlink_to(tmp_path / "ckpt" / "step-0000002", target_is_directory=True)
    return tmp_path


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "ckpt").iterdir()}


def test_foreign_names_do_not_count_as_checkpoints(run: Path) -> None:
    log: list[str] = []
    assert newest(run / "ckpt", log.append) == step_folder(run, 3)
    assert newest_step(run) == 3
    assert find_checkpoint(run) == step_folder(run, 3)
    assert len(log) == len(FOREIGN) - 1 + 2, "all but the dotfile"
    assert f"ignored {run}/ckpt/step-0000003-good: not a name of a checkpoint" in log


def test_foreign_names_are_not_removed(run: Path) -> None:
    save(run, 10)
    step_folder(run, 1).with_name("step-0000001.partial").mkdir()
    prune(run / "ckpt", keep_last=1)
    assert names(run) == {*FOREIGN, "step-0000009", "step-0000008", "step-0000010"}
    keep_only(run / "ckpt", step_folder(run, 10))
    assert names(run) == {*FOREIGN, "step-0000009", "step-0000008", "step-0000010"}


def test_foreign_names_on_a_local_disk_are_not_listed(run: Path) -> None:
    assert set(_listing(run / "ckpt")) == {"2", "3"}


def test_damaged_list_of_files_on_a_local_disk_is_none(run: Path) -> None:
    marker = step_folder(run, 3) / "complete.json"
    marker.write_text('{"a": {"size": 1}}')
    assert _listing(run / "ckpt")["3"][1] == marker.read_text()
    marker.write_text('{"a": {"si')
    assert _listing(run / "ckpt")["3"][1] is None


def test_only_an_interrupted_save_is_copied_from_a_local_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: Any = SimpleNamespace(rank=0, main=True, gather=lambda value: [value])  # one process
    log: list[str] = []
    config, run = CheckpointConfig(local_dir=str(tmp_path / "disk")), tmp_path / "run"
    root = local_root(config, run)
    assert root
    save(run, 500)
    root.mkdir(parents=True)
    save(tmp_path / "made", 1000).rename(root / "step-0001000")

    def copied() -> bool:
        return carry_over(config, run, groups, log.append)

    # step 1000 was complete in the run folder and removed, to repeat its steps
    assert not copied() and "step 1000: ignored, " in log[-1] and newest_step(run) == 500
    shutil.rmtree(run)  # and a new run in the same folder has saved nothing
    assert not copied() and newest_step(run) == -1
    partial = step_folder(run, 1000).with_name("step-0001000.partial")
    (partial / "weights").mkdir(parents=True)  # the job was killed during the copy
    with monkeypatch.context() as full:
        full.setattr(HashedFile, "check", lambda file: _raise_full())
        assert not copied() and "could not be copied" in log[-1]
    assert not list(partial.iterdir()), "an empty folder: the next start tries again"
    assert copied() and newest_step(run) == 1000 and not partial.exists()


def _raise_full() -> None:
    raise OSError(28, "No space left on device")


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    save(tmp_path, 9_999_999)
    save(tmp_path, 10_000_000)
    assert newest_step(tmp_path) == 10_000_000
    prune(tmp_path / "ckpt", keep_last=1)
    assert names(tmp_path) == {"step-10000000"}


def test_unreadable_folder_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint_folder.os, "scandir", refuse)
    with pytest.raises(CheckpointError, match="cannot be listed: Permission denied"):
        newest(tmp_path / "ckpt", print)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_errors_of_reading_condemn_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    groups: Any = SimpleNamespace(rank=0, world_size=1, main=True, gather=lambda value: [value])
    for folder in (save(tmp_path, step) for step in (2, 3)):
        (folder / "weights.distcp").write_bytes(b"1234")
        seal(folder)
    # the last numbers: files that are opened before, to check them or to hash them
    cases = [(newest_step, tmp_path, "distcp", 0), (newest_step, tmp_path, "state.json", 2)]
    cases += [(lambda path: damage(path, groups), folder, "distcp", opened) for opened in (0, 1)]
    for check, path, name, opened in cases:
        with monkeypatch.context() as failing, pytest.raises(UnreadableError, match=os.strerror(number)) as caught:
            failing.setattr("builtins.open", failing_open(name, number, opened))
            check(path)
        code, fix = (2, "permission to read") if number == errno.EACCES else (1, "rename the folder to step-….damaged")
        assert caught.value.exit_code == code and fix in caught.value.fix and name in caught.value.where
    assert names(tmp_path) == {"step-0000002", "step-0000003"} and newest_step(tmp_path) == 3


WRONG, FAILS = CheckpointError("w is damaged"), UnreadableError("w cannot be read", "w", "rename it to .damaged", 1)


@pytest.mark.parametrize(
    ("hosts", "readings", "expected"),
    [
        (["n0", "n1"], {(1, 1): FAILS, (0, 1): FAILS}, FAILS),
        (["n0", "n1"], {(1, 1): WRONG, (0, 1): FAILS}, FAILS),
        (["n0", "n1"], {(1, 1): FAILS, (0, 1): WRONG}, FAILS),
        (["n0", "n1"], {(1, 1): WRONG, (0, 1): WRONG}, "w is damaged"),
        (["n0", "n1"], {(0, 0): WRONG}, [0]),
        (["n0", "n0", "n1"], {(0, 0): WRONG, (1, 0): WRONG}, [0]),
        (["n0", "n0", "n1", "n1"], {(2, 2): FAILS, (3, 3): WRONG}, [2, 3]),
        (["n0", "n0"], {(1, 1): WRONG}, [1]),
        (["n0", "n0"], {(1, 1): WRONG, (0, 1): WRONG}, "w is damaged"),
    ],
)
def test_another_host_reads_again(monkeypatch: pytest.MonkeyPatch, hosts: list, readings: dict, expected: Any) -> None:
    """All processes end alike, also where a file cannot be read, and only a host that differs from another is named.

    readings: errors by process and by whose share it reads.
    """
    here, everyone, step = threading.local(), dict.fromkeys(range(len(hosts))), threading.Barrier(len(hosts), timeout=9)

    def read(folder: Path, share: tuple[int, int]) -> None:
        if error := readings.get((here.rank, share[0])):
            raise error

    def gather(value: Any) -> list[Any]:
        everyone[here.rank] = json.loads(json.dumps(value))
        step.wait()
        values = list(everyone.values())
        step.wait()
        return values

    def process(rank: int) -> Any:
        here.rank = rank
        groups: Any = SimpleNamespace(rank=rank, world_size=len(hosts), gather=gather)
        try:
            return damage(Path("step-3"), groups)
        except (ReplicaError, UnreadableError) as error:
            return error

    monkeypatch.setattr(restore, "check_files", read)
    monkeypatch.setattr(restore.socket, "gethostname", lambda: hosts[here.rank])
    with ThreadPoolExecutor(len(hosts)) as pool:
        ends = list(pool.map(process, range(len(hosts))))
    assert len({(type(end), str(end)) for end in ends}) == 1
    for end in ends:
        if isinstance(expected, list):
            assert isinstance(end, ReplicaError) and end.ranks == expected and "reads it intact" in end.what
        else:
            assert str(end) == str(expected) and getattr(end, "exit_code", 1) == 1


STATES: list[tuple[dict[str, Any], str]] = [
    ({"step": "3"}, "step is text ('3'), not a whole number"),
    ({"step": -1}, "step is -1, below 0"),
    ({"step": True}, "step is true or false"),
    ({"rows_per_step": 0}, "rows_per_step is 0, below 1"),
    ({"consumed_rows": 1.5}, "consumed_rows is a number"),
    ({"shape": []}, "shape is a list, not an object"),
    ({"shape": {**asdict(SHAPE), "num_layers": "two"}}, "num_layers is text ('two'), not a whole number"),
    ({"shape": {**asdict(SHAPE), "layers": 2}}, "unknown keys ['layers']"),
    ({"diffusion": {"block_size": None}}, "block_size is null, not a whole number"),
    ({"dataset": None}, "dataset is null, not an object"),
    ({"with_optimizer": "yes"}, "with_optimizer is text ('yes'), not true or false"),
    ({"precision": 32}, "precision is a whole number ('32'), not text"),
    ({"mine": 1}, "unknown keys ['mine']"),
]


@pytest.mark.parametrize(("changes", "message"), STATES)
def test_wrong_fields_of_state_json_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = save(tmp_path, 3)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, **changes}))
    seal(folder)
    with pytest.raises(CheckpointError) as raised:
        read_state(folder)
    assert message in raised.value.what and "state.json" in raised.value.where


def test_state_of_an_older_version_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    state = json.loads((folder / "state.json").read_text())
    del state["eos_token_id"], state["diffusion"]["target_shift"], state["diffusion"]["next_token_weight"]
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder)
    assert read_state(folder).eos_token_id == -1 and read_state(folder).diffusion.target_shift is True


HOSTILE = {
    "empty": "",
    "list": "[]",
    "nested": "[" * 100_000,
    "nan": '{"step": NaN}',
    "number": '{"size": 1' + "0" * 5000 + "}",
    "bytes": "\udcff",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("name", ["state.json", "complete.json", "run.json"])
def test_hostile_files_are_refused_and_skipped(tmp_path: Path, name: str, text: str) -> None:
    save(tmp_path, 2)
    folder = save(tmp_path, 3)
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    if name != "complete.json":
        seal(folder)
    with pytest.raises(CheckpointError) as raised:
        read_run(folder) if name == "run.json" else read_state(folder)
    assert name in raised.value.where
    if name == "complete.json":
        assert newest_step(tmp_path) == 2


ENTRIES: list[tuple[Any, str]] = [
    ({"state.json": {"size": "9", "sha256": "0"}}, "size is text"),
    ({"state.json": {"size": -1, "sha256": "0"}}, "below 0"),
    ({"state.json": [9, "0"]}, "state.json is a list, not an object"),
    ({"../../secret": {"size": 4, "sha256": "0"}}, "leads out of its folder"),
    ({"/dev/zero": {"size": 0, "sha256": "0"}}, "leads out of its folder"),
    ({"weights": {"size": 4096, "sha256": "0"}}, "is not a regular file"),
]


@pytest.mark.parametrize(("entries", "message"), ENTRIES)
def test_entries_of_complete_json_are_checked(tmp_path: Path, entries: Any, message: str) -> None:
    folder = save(tmp_path, 3)
    (tmp_path / "secret").write_text("text")
    (folder / "weights").mkdir()
    state = json.loads((folder / "complete.json").read_text())["state.json"]
    (folder / "complete.json").write_text(json.dumps({"state.json": state} | entries))
    for check in (check_complete, check_files):
        with pytest.raises(CheckpointError) as raised:
            check(folder)
        assert message in raised.value.what, check


def test_list_of_files_without_the_state_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    (folder / "complete.json").write_text("{}")
    with pytest.raises(CheckpointError, match="complete.json lists no state.json"):
        check_complete(folder)


RUNS: list[tuple[dict[str, Any], str]] = [
    ({"settings": []}, "settings is a list, not an object"),
    ({"settings": {"train": 3}}, "train is a whole number ('3'), not an object"),
    ({"base": 5}, "base is a whole number"),
    ({"adapter": ["a"]}, "adapter is a list"),
    ({"data_parallel": "2"}, "data_parallel is text"),
    ({"losses": None}, "losses is null"),
    ({"losses": {"loss": "low"}}, "loss is text ('low'), not a number"),
    ({"versions": ["torch"]}, "versions is a list"),
]


@pytest.mark.parametrize(("content", "message"), RUNS)
def test_wrong_fields_of_run_json_are_named(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    folder = save(tmp_path, 3)
    (folder / "run.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as raised:
        read_run(folder)
    assert message in raised.value.what and "run.json" in raised.value.where


def test_a_run_without_a_usable_checkpoint_says_where_the_reasons_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ckpt").mkdir()
    with pytest.raises(CheckpointError, match="train until it has saved one"):
        find_checkpoint(tmp_path)
    (save(tmp_path, 2) / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="the lines above say why"):
        find_checkpoint(tmp_path)
    assert "ignored" in capsys.readouterr().err
