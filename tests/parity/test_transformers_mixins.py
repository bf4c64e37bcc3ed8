"""transformers' own tests of models, from its source distribution, on the class that an export ships.

The source distribution lacks GenerationTesterMixin (tests/generation/): test_generate.py tests the same subjects.
"""

import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from transformers import Qwen2Config
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from tests.helpers import REPO
from tests.oldest_transformers import OLDEST, fetch_tests
from tests.parity import exported

try:
    sys.path.insert(0, str(fetch_tests(REPO / ".cache", transformers.__version__)))
except subprocess.CalledProcessError as error:
    message = f"the tests of transformers {transformers.__version__} could not be fetched: {error}"
    if os.environ.get("CI") == "true":
        raise
    pytest.skip(message, allow_module_level=True)

from transformers_tests.test_modeling_common import ModelTesterMixin  # type: ignore[import-not-found]

SKIPS = {"test_generation_tester_mixin_inheritance": "that mixin is not in the source distribution, see GENERATION"}
"""Tests that do not apply, and why. Those for GPUs or other kinds of models skip by themselves, with a reason."""
if transformers.__version__ != OLDEST:
    SKIPS["test_eager_matches_sdpa"] = "the attention is the base's own; `make test-transformers` tests it"
GENERATION = {
    "greedy search, dict outputs": "test_generate_equals_the_library_decoding",
    "sampling": "test_sampling_follows_the_seed_and_the_warpers",
    "left padding": "test_batch_equals_one_by_one",
    "static cache, without a cache": "test_batch_equals_one_by_one",
    "compiled forward": "test_decode_batch.py, test_fixed_shape_compiles_one_graph",
    "past_key_values": "refused where they hold tokens: a pass writes the cache of whole rows",
    "quantized and offloaded cache": "refused: a window needs a cache that is written at columns",
    "beam search, assistants, prompt lookup": "refused: a pass proposes several tokens by itself",
    "inputs_embeds, position_ids": "refused: windows repeat tokens, at positions of their own",
    "scores, attentions, hidden states": "refused: a pass has no one score for each token",
    "without input_ids, logits_to_keep, length limits": "below, and test_lengths_are_exact",
}
"""Subjects of GenerationTesterMixin: our tests of them, or why they are refused (a test in test_generate.py)."""


class SDLMTester:
    """A random model and a batch, in the form that the mixin reads."""

    batch_size, seq_length, is_training, num_hidden_layers, hidden_size, num_attention_heads = 3, 7, True, 2, 32, 4

    def get_config(self) -> Qwen2Config:
        """A configuration of an exported folder."""
        return Qwen2Config(
            vocab_size=99,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            intermediate_size=37,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            block_size=4,
            causal_attn=False,
            text_mask_token_id=98,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Qwen2Config, dict[str, torch.Tensor]]:
        """Configuration and input."""
        ids = torch.randint(3, 98, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class TestModel(ModelTesterMixin, unittest.TestCase):
    """The mixin's tests of SDLMForCausalLM."""

    all_model_classes: ClassVar[tuple[Any, ...]] = ()
    test_pruning = test_head_masking = False  # of transformers 4; Qwen2 has neither
    model_split_percents: ClassVar[list[float]] = [0.5, 0.7, 0.8]

    @classmethod
    def setUpClass(cls) -> None:
        """Loads the class as users get it."""
        scratch = tempfile.TemporaryDirectory()
        cls.addClassCleanup(scratch.cleanup)
        folder = exported.export("random", Path(scratch.name) / "hf")
        cls.all_model_classes = (get_class_from_dynamic_module("modeling_sdlm.SDLMForCausalLM", str(folder)),)

    def setUp(self) -> None:
        """Skips by the table."""
        self.model_tester = SDLMTester()
        torch.manual_seed(0)
        for name, reason in SKIPS.items():
            if self._testMethodName.startswith(name):
                self.skipTest(reason)

    def _prepare_for_class(self, inputs: Any, model_class: Any, return_labels: bool = False) -> dict[str, Any]:
        """Adds labels, which transformers does for classes of its own only."""
        prepared: dict[str, Any] = super()._prepare_for_class(inputs, model_class, return_labels=return_labels)
        return prepared | ({"labels": inputs["input_ids"]} if return_labels else {})

    def model(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """A model in eval mode, and a batch."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return self.all_model_classes[0](config).eval(), inputs

    def test_generate_without_input_ids(self) -> None:
        """Begins with the token bos."""
        model, _ = self.model()
        assert model.generate(max_new_tokens=5)[0, 0] == 1

    def test_generate_with_default_length(self) -> None:
        """20 tokens after the prompt in transformers 5, 20 in all in transformers 4, as in next-token decoding."""
        model, inputs = self.model()
        sizes = {alg: model.generate(**inputs, sdlm_alg=alg, eos_token_id=None).shape for alg in ("prob_conf", "ar")}
        assert sizes["prob_conf"] == sizes["ar"]

    def test_logits_to_keep(self) -> None:
        """The last logits only."""
        model, inputs = self.model()
        with torch.no_grad():
            whole, last = model(**inputs).logits, model(**inputs, logits_to_keep=1).logits
        torch.testing.assert_close(whole[:, -1:], last)

    def test_several_sequences_of_each_row(self) -> None:
        """In the order of the rows; each draws by itself."""
        model, inputs = self.model()
        options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 6, "sdlm_seed": 3}
        out = model.generate(**inputs, **options, return_dict_in_generate=True)
        size = inputs["input_ids"].shape[1]
        assert out.sequences[:, :size].equal(inputs["input_ids"].repeat_interleave(2, 0))
        assert len({str(row) for row in out.sequences.tolist()}) == 6
        assert out.passes >= max(map(len, out.accepted))
