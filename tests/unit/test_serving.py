"""`sdlm evaluate serving` against two small HTTP servers like vLLM's; serving/vllm/tests has the real one."""

import contextlib
import json
import re
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sdlm_megatron.chat.chat_model import DecodingRule
from sdlm_megatron.diffusion.settings import SDLMSettings
from sdlm_megatron.errors import CheckpointError, ConfigError, DataError, UserError
from sdlm_megatron.evaluation import serving
from sdlm_megatron.evaluation.page import main as page
from sdlm_megatron.evaluation.result_files import served_comparison, served_rates
from sdlm_megatron.evaluation.vllm_server import VLLMServer, running, serve_command
from tests.parity import decode_oracle as o

WORDS = ["", "ab", "c"]
"""Text of the chunks after the one with the role: the first text comes late, and a token has no text."""
DELAY = 0.016


class VLLMLike(ThreadingHTTPServer):
    """Counts what it is asked; with the plugin, a pass keeps two tokens unless sdlm_alg is ar."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, plugin: bool) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.plugin, self.lock = plugin, threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.now = self.most_at_once = self.passes = self.tokens = 0
        self.broken, self.dying = "", False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answering(BaseHTTPRequestHandler):
    server: VLLMLike

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, text: str, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        counters = f'# TYPE sdlm:passes_total counter\nsdlm:passes_total{{m="x"}} {self.server.passes}.0\n'
        counters += f'sdlm:tokens_total{{m="x"}} {self.server.tokens}.0\n'
        pages = {
            "/v1/models": '{"data": [{"id": "served"}]}',
            "/version": '{"version": "0.32.0"}',
            "/metrics": "python_info 1.0\n" + counters * self.server.plugin,
        }
        self.reply(pages.get(self.path, ""))

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        alg = body.get("vllm_xargs", {}).get("sdlm_alg")
        refusal = '{"error": {"message": "SDLM does not support it", "code": 400}}'
        if alg == "lossless":  # vLLM checks these options once the stream has begun
            self.reply(f"data: {refusal}\n\ndata: [DONE]\n\n")
            return
        if server.broken == body["messages"][0]["content"]:
            self.reply(refusal, 400)
            return
        with server.lock:
            server.bodies.append(body)
            server.now += 1
            server.most_at_once = max(server.most_at_once, server.now)
        self.send_response(200)
        self.end_headers()
        deltas = [{"role": "assistant", "content": ""}, *({"content": word} for word in WORDS)]
        for number, delta in enumerate(deltas):
            if server.dying and number == 2:  # the connection ends within the answer
                return
            time.sleep(DELAY / 2 * (number > 0))
            self.wfile.write(f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n".encode())
        usage = {"choices": [], "usage": {"completion_tokens": 4}}
        with server.lock:
            server.now -= 1
        self.wfile.write(f": ping\n\ndata: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())
        with server.lock:
            server.tokens += 4
            server.passes += 4 if alg == "ar" else 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return o.export("trained_d4", tmp_path_factory.mktemp("exported") / "sdlm")


@pytest.fixture
def servers() -> Any:
    both = [VLLMLike(True), VLLMLike(False)]
    for server in both:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield both
    for server in both:
        server.shutdown()
        server.server_close()


@pytest.fixture
def command(folder: Path, servers: list[VLLMLike], tmp_path: Path) -> list[str]:
    rows = [{"prompt": f"question {i}", "expected": "abc" if i % 4 else "other"} for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", str(folder), "--out", str(tmp_path / "out"), "--prompts", str(tmp_path / "prompts.jsonl")]
    urls = ["--url", *(server.address for server in servers)]
    return [*options, *urls, "--at", "1", "5", "--rounds", "2", "--thresholds", "0.5", "1", "--tokens", "9"]


def read(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "serving.json").read_text())


def test_measures_both_servers_with_the_same_requests(
    command: list[str], servers: list[VLLMLike], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    serving.main([*command, "--", "--secret", "s3cret", "--a-token=s3cret"])
    result = read(tmp_path)
    assert result["settings"]["serve"] == ["--secret", "***", "--a-token=***"]
    assert result["facts"]["vllm"] == "0.32.0" and result["facts"]["block_size"] == 4
    rows = {(row["alg"], row["threshold"], row["at"]): row for row in result["rows"]}
    assert set(rows) == {
        (alg, tau, at)
        for alg, tau in (("prob_conf", 0.5), ("prob_conf", 1.0), ("ar", None), ("plain serving", None))
        for at in (1, 5)
    }
    for (alg, _, at), row in rows.items():
        count = {1: 8, 5: 10}[at]
        assert len(row["tokens"]) == len(row["first"]) == len(row["seconds"]) == count
        assert row["passes"] == 4 * count / (2 if alg == "prob_conf" else 1), "without those of the warm-up"
        assert all(DELAY <= first <= seconds for first, seconds in zip(row["first"], row["seconds"], strict=True))
        assert row["wall"] >= count // at * 1.5 * DELAY
        assert row["exact"] == [int(i % 6 % 4 > 0) for i in range(count)]
    # a measurement sends the first `at` prompts as a warm-up, then all
    measured = [body for body in servers[1].bodies if body["max_tokens"] == 9]
    assert Counter(b["messages"][0]["content"] for b in measured) == Counter(
        f"question {i % 6}" for count in (8, 10) for i in range(count)
    )
    assert len(servers[1].bodies) == len(measured) + 1 + 5 and 1 < servers[1].most_at_once <= 5
    assert not any("vllm_xargs" in body for body in servers[1].bodies)
    assert all(b["temperature"] == 0 and b["model"] == "served" and b["stream"] for b in measured)
    asked_of_sdlm = Counter(json.dumps(b["vllm_xargs"], sort_keys=True) for b in servers[0].bodies)
    conf = '{{"sdlm_alg": "prob_conf", "sdlm_n": 4, "sdlm_product": 0, "sdlm_threshold": {}}}'
    plain = '{"sdlm_alg": "ar", "sdlm_n": 1}'
    assert asked_of_sdlm == {conf.format(0.5): 24, conf.format(1.0): 24, plain: 24}
    salts = [body["cache_salt"] for server in servers for body in server.bodies]
    assert len(set(salts)) == len(salts), "no prompt is taken from the cache"
    output = capsys.readouterr().out
    assert not [path for path in (tmp_path / "out").iterdir() if "s3cret" in output + path.read_text()]
    assert re.search(r"^n = 1 (LOSES to|is faster than) plain serving at ", output, re.MULTILINE)
    assert '<section id="serving"' in (tmp_path / "out" / "index.html").read_text()


def test_continues_where_it_stopped(command: list[str], servers: list[VLLMLike], tmp_path: Path) -> None:
    servers[1].broken = "question 5"  # not among the 5 prompts of a warm-up
    with pytest.raises(UserError, match="refused a request: SDLM does not support it"):
        serving.main(command)
    partial = read(tmp_path)
    assert len(partial["rows"]) == 6, "those of the first server"
    servers[1].broken, sent = "", len(servers[0].bodies)
    serving.main(command)
    assert read(tmp_path)["rows"][:6] == partial["rows"] and len(read(tmp_path)["rows"]) == 8
    assert len(servers[0].bodies) == sent
    with pytest.raises(DataError, match=r"measured with tokens 9, not 8[\s\S]*another --out"):
        serving.main([*command, "--tokens", "8"])
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(prompts.read_text().replace("other", "another"))  # an expected answer
    with pytest.raises(DataError, match="measured with prompts "):
        serving.main(command)


def test_dry_run_sends_and_writes_nothing(
    command: list[str], servers: list[VLLMLike], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    serving.main([*command, "--dry-run"])
    text = capsys.readouterr().out
    assert text.count("10 requests, 5 at a time, at most 9 tokens each") == 4
    # 4 rules: 18 requests of 9 tokens, and a warm-up of 6 requests of 8
    assert f"at most {4 * (18 * 9 + 6 * 8)} tokens" in text
    start = [*command[: command.index("--url")], "--vllm", sys.executable, "--dry-run"]
    serving.main([*start, "--", "--secret", "s3cret", "--seed", "1"])
    assert "--secret '***' --seed 1\n" in (text := capsys.readouterr().out) and "s3cret" not in text
    assert not servers[0].bodies and not (tmp_path / "out").exists()


def test_what_the_plugin_refuses_is_left_out(
    command: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdlm_megatron.diffusion.settings.SDLMSettings.lossless", True)
    serving.main(command)
    assert {row["alg"] for row in read(tmp_path)["rows"]} == {"prob_conf", "ar", "plain serving"}
    assert "SDLM does not support it" in read(tmp_path)["refused"]["lossless, n = 4"]
    page([str(tmp_path / "out"), "--out", str(tmp_path / "a.html")])
    assert "lossless, n = 4 was not measured" in (tmp_path / "a.html").read_text()


def test_disturbed_and_mistaken_servers_are_reported(
    command: list[str], servers: list[VLLMLike], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped = [*command[: command.index("--url")], "--url", *(server.address for server in servers[::-1])]
    with pytest.raises(UserError, match="decodes without the plugin"):
        serving.main(swapped)
    with pytest.raises(UserError, match="decodes with the plugin"):
        serving.main([*swapped[:-2], servers[0].address, servers[0].address, "--at", "1", "--out", str(tmp_path / "b")])
    monkeypatch.setattr("sdlm_megatron.evaluation.vllm_server.SETTLE_SECONDS", 0.1)

    def others(self: VLLMServer, prompts: list[str], *rest: Any) -> Any:
        servers[0].tokens += 3
        return ask_all(self, prompts, *rest)

    ask_all = VLLMServer.ask_all
    monkeypatch.setattr(VLLMServer, "ask_all", others)
    with pytest.raises(UserError, match=r"counts 7 tokens, and 4 were answered[\s\S]*let no one else use it"):
        serving.main([*command, "--out", str(tmp_path / "c")])
    with pytest.raises(UserError, match="does not answer"):
        serving.main([*command, "--url", "http://127.0.0.1:9", "--out", str(tmp_path / "d")])
    monkeypatch.setattr(VLLMServer, "ask_all", ask_all)
    servers[0].dying = True
    with pytest.raises(UserError, match="broke off an answer"):
        serving.main([*command, "--out", str(tmp_path / "e")])
    with pytest.raises(UserError, match=r"not that of vLLM: '\[\]'[\s\S]*/version"):
        monkeypatch.setattr(VLLMServer, "get", lambda *_: "[]")
        VLLMServer("http://x").version()


def test_wrong_input_is_named(folder: Path, command: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    with pytest.raises(DataError, match=r"no text under 'prompt'[\s\S]*bad.jsonl, line 2"):
        serving.main([*command, "--prompts", str(tmp_path / "bad.jsonl")])
    plain = tmp_path / "plain"
    plain.mkdir()
    config = json.loads((folder / "config.json").read_text())
    del config["block_size"], config["auto_map"]
    (plain / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(DataError), pytest.raises(CheckpointError, match="not an SDLM"):
        serving.main([*command, "--model", str(plain)])
    api, hub = "VLLM_API_KEY", "HF_TOKEN"
    for option, variable in (("--api-key", api), ("--api_key=K", api), ("--hf-token=K", hub)):
        with pytest.raises(ConfigError, match=f"into its log[\\s\\S]*set {variable}=…"):
            serving.main([*command, "--", option])
    start = [*command[: command.index("--url")], "--vllm", sys.executable, "--dry-run"]
    results = serving.ServingRun(serving.build_parser().parse_args(start), [])
    results.path.write_text(json.dumps(results.result))
    serving.main([*start, "--model", f"{folder}/../{folder.name}"])  # the same folder, however it is spelled
    with pytest.raises(ConfigError, match="no such program"):
        serve_command("no-vllm-here", folder, [])
    assert len(set(serving.built_in_prompts())) > 100


def test_the_end_of_a_log_shows_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "of-the-environment")
    words = ["sh", "-c", "echo $1 $2 $VLLM_API_KEY fails; exit 1", "--secret", "s3cret", "--url=http://me:pass@a"]
    server = running(words, tmp_path / "log", plugin=True)
    with pytest.raises(UserError, match="did not start") as raised, server:
        pass
    assert raised.value.what.splitlines()[1:] == ["*** --url=http://*** *** fails"]


def test_the_folders_rule_is_measured() -> None:
    own = {"block_size": 4, "mask_token_id": 5, "alg": "entropy_conf", "n": 2, "threshold": 0.7, "product": True}
    entropy, plain = DecodingRule("entropy_conf", 2, 0.7, True), DecodingRule()
    assert serving.rules_of(SDLMSettings(**own), []) == [entropy, plain]
    assert serving.rules_of(SDLMSettings(**own, target_shift=False), []) == [entropy]
    causal = serving.rules_of(SDLMSettings(**own, causal_attn=True), [0.5])
    assert causal == [DecodingRule("entropy_conf", 2, 0.5, True), DecodingRule("lossless", 2), plain]
    assert serving.rules_of(SDLMSettings(**{**own, "n": 1}, causal_attn=True), [0.5, 0.9]) == [plain]


def test_rates_are_those_of_the_rows() -> None:
    def row(alg: str, at: int, wall: float, **more: Any) -> dict[str, Any]:
        answers = {"tokens": [10, 30], "first": [0.1, 0.3], "seconds": [1.0, 2.0], "passes": 20.0}
        return {"alg": alg, "n": 4, "threshold": 0.9, "at": at, "wall": wall, **answers, **more}

    plain = [row("plain serving", at, 4.0, n=1, threshold=None, passes=40.0) for at in (1, 2)]
    rates = served_rates({"rows": [row("prob_conf", 1, 2.0, exact=[1, 0]), row("prob_conf", 2, 5.0), *plain]})
    assert [(rate.at, rate.name, rate.rate, rate.ratio, rate.speed) for rate in rates] == [
        (1, "plain serving", 10, 1, 1),
        (1, "prob 0.9, n = 4", 20, 2, 2),
        (2, "plain serving", 10, 1, 1),
        (2, "prob 0.9, n = 4", 8, 0.8, 2),
    ]
    assert rates[1].first == pytest.approx((0.2, 0.28)) and rates[1].seconds == pytest.approx((1.5, 1.9))
    assert rates[1].exact == 0.5 and rates[3].exact is None and rates[1].tokens == 20
    assert list(served_comparison(rates)) == [
        "prob 0.9, n = 4 LOSES to plain serving at 2 (0.80 times its tokens/s) at a time.",
        "prob 0.9, n = 4 is faster than plain serving at 1 (2.00 times its tokens/s) at a time.",
    ]
