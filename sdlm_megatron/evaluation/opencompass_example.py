"""Config of OpenCompass: exact answers of one folder to prompts from a JSONL file of {"prompt", "expected"}.

With sdlm-megatron installed in OpenCompass' environment, see docs/evaluation.md:

    SDLM_FOLDER=DIR SDLM_PROMPTS=prompts.jsonl opencompass PATH_OF_THIS_FILE -w runs/oc
"""

import os

from opencompass.datasets import JsonlDataset
from opencompass.openicl.icl_evaluator import AccEvaluator
from opencompass.openicl.icl_inferencer import GenInferencer
from opencompass.openicl.icl_prompt_template import PromptTemplate
from opencompass.openicl.icl_retriever import ZeroRetriever

from sdlm_megatron.evaluation.opencompass_model import SDLM

datasets = [
    {
        "type": JsonlDataset,
        "abbr": "prompts",
        "path": os.path.abspath(os.environ["SDLM_PROMPTS"]),
        "reader_cfg": {"input_columns": ["prompt"], "output_column": "expected"},
        "infer_cfg": {
            "prompt_template": {
                "type": PromptTemplate,
                "template": {"round": [{"role": "HUMAN", "prompt": "{prompt}"}]},
            },
            "retriever": {"type": ZeroRetriever},
            "inferencer": {"type": GenInferencer},
        },
        "eval_cfg": {"evaluator": {"type": AccEvaluator}},
    }
]
models = [
    {
        "type": SDLM,
        "abbr": f"sdlm-{alg}-{threshold}",
        "path": os.path.abspath(os.environ["SDLM_FOLDER"]),
        "alg": alg,
        "threshold": threshold,
        "system": os.environ.get("SDLM_SYSTEM"),
        "max_out_len": 128,
        "batch_size": 16,
        "run_cfg": {"num_gpus": 0},
    }
    for alg, threshold in (("prob_conf", 0.98), ("ar", 1.0))
]

del os  # OpenCompass writes every name that a config defines into the run's folder, and a module cannot be written
