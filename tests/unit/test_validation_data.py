"""Validation data must match the training data; mismatches are reported before anything is built."""

from pathlib import Path

import pytest
from helpers import make_dataset

from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import DataError
from sdlm_megatron.training.run_plan import open_validation


@pytest.mark.parametrize(
    ("made", "named"),
    [
        ({"row_length": 64}, "row_length is 64, in the training data it is 128"),
        ({"block_size": 8}, "block_size is 8"),
        ({"mask_token_id": 7}, "mask_token_id is 7"),
        ({"tokenizer": {"fingerprint": "b", "name": "other"}}, "another tokenizer"),
    ],
)
def test_mismatched_validation_data_is_reported(tmp_path: Path, made: dict, named: str) -> None:
    tokenizer = {"fingerprint": "a", "name": "bytes"}
    config = RunConfig()
    training = PackedDataset(make_dataset(tmp_path / "data", rows=2, tokenizer=tokenizer))
    assert open_validation(config, training) is None
    config.data.validation = str(make_dataset(tmp_path / "other", **{"rows": 2, "tokenizer": tokenizer, **made}))
    with pytest.raises(DataError, match=named) as caught:
        open_validation(config, training)
    assert caught.value.where.startswith("data.validation")
    config.observe.validate_every = 0
    assert open_validation(config, training) is None


def test_matching_validation_data_is_opened(tmp_path: Path) -> None:
    config = RunConfig()
    config.data.validation = str(make_dataset(tmp_path / "other", rows=3, seed=1))
    validation = open_validation(config, PackedDataset(make_dataset(tmp_path / "data", rows=2)))
    assert validation is not None and validation.rows(0) == 3
