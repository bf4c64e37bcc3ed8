"""The smoke run (`make smoke`): conversations to a report, with a real vocabulary and a resume in another layout."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dev.quickstart.pipeline import Pipeline
from sdlm_megatron.errors import UserError
from tests.smoke import demonstration


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("forked_commands")
def test_every_stage_reads_what_the_one_before_wrote(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = Pipeline(replace(demonstration("qwen2"), run_dir=tmp_path / "smoke")).run()
    assert report == tmp_path / "smoke" / "report.html" and report.stat().st_size
    printed = "".join(capfd.readouterr())
    assert "resume" in printed and "WARNING" not in printed and "differently from the training data" not in printed
    assert [row["alg"] for row in json.loads(report.with_name("evaluation.json").read_text())["rows"]]


def test_a_run_folder_that_cannot_be_removed_is_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="(?s)cannot be made anew.*link.*remove it"):
        Pipeline(replace(demonstration("qwen2"), run_dir=tmp_path / "link")).run()
