"""Output of the reference's code for an exported folder. Runs in a separate old environment (transformers
4.37.2), so it imports nothing from this project.

    $SDLM_REFERENCE_PYTHON tests/reference_generate.py CHECKOUT FOLDER < requests.json > answers.json

Requests: {"texts": […], "chat": messages, "runs": [{"prompt": ids, "alg", "cache", "threshold", "max_new"}…]}. Answers:
{"version", "refusal": message of our class, "tokens": ids of each text, "chat": ids, "hidden": a token that the
reference ignores where it was generated, "runs": new tokens of each run, "logits": of the first prompt, by the
reference's class and by transformers' own}.
"""

import contextlib
import json
import sys


def main() -> None:
    """Reads the requests from stdin and prints the answers."""
    checkout, folder = sys.argv[1:]
    sys.path.insert(0, checkout)
    requests = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):  # the reference prints to stdout
        answers = answer(folder, requests)
    json.dump(answers, sys.stdout)


def answer(folder: str, requests: dict) -> dict:
    """All answers; the files of the folder are read as a user of the reference reads them."""
    import torch
    import transformers
    from sdlm.model.sdlm_qwen2_5 import generate_utils
    from sdlm.model.sdlm_qwen2_5.modeling_qwen2 import Qwen2ForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        refusal = None
    except ImportError as error:
        refusal = str(error)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = transformers.Qwen2ForCausalLM.from_pretrained(folder).eval()
    model = Qwen2ForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()  # its default is FlashAttention
    eos = model.generation_config.eos_token_id
    generate_utils.EOS_TOKEN_IDS = eos if isinstance(eos, list) else [eos]  # constants of Qwen2.5's vocabulary there
    generate_utils.PAD_TOKEN_ID = model.config.vocab_size - 1  # it removes this token from generated text
    first = torch.tensor([requests["runs"][0]["prompt"]])
    with torch.no_grad():
        logits = {"reference": model(first).logits.tolist(), "plain": plain(first).logits.tolist()}
    return {
        "version": transformers.__version__,
        "refusal": refusal,
        "tokens": [tokenizer(text).input_ids for text in requests["texts"]],
        "chat": tokenizer.apply_chat_template(requests["chat"], add_generation_prompt=True),
        "hidden": generate_utils.PAD_TOKEN_ID,
        "runs": [run(generate_utils, model, tokenizer, request) for request in requests["runs"]],
        "logits": logits,
    }


def run(generate_utils, model, tokenizer, request: dict) -> list:
    """New tokens of one run of the reference's generate function, which itself returns text."""
    import torch
    from transformers import BatchEncoding

    class Recorder:
        model_max_length = tokenizer.model_max_length

        def batch_decode(self, ids, **kwargs) -> list:
            self.ids = ids[0].tolist()
            return tokenizer.batch_decode(ids, **kwargs)

    recorder = Recorder()
    generate_utils.SDLM_generate(
        model,
        recorder,
        BatchEncoding({"input_ids": torch.tensor([request["prompt"]])}),
        max_gen_len=request["max_new"],
        threshold=request["threshold"],
        n_future_tokens=4,
        use_cache=request["cache"],
        alg=request["alg"],
    )
    return recorder.ids


if __name__ == "__main__":
    main()
