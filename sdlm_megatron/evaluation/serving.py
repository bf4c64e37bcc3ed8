"""Serving: throughput and latency of vLLM with an SDLM folder, beside plain token-by-token serving of the same folder.

Starts `vllm serve` with the plugin sdlm-vllm and then without it (VLLM_PLUGINS=""), in your environment of vLLM, and
sends both the same prompts, 1, 4, 16 and 64 at a time. Every request has to be answered. Writes OUT/serving.json after
each measurement, so that an interrupted command continues where it stopped, and OUT/index.html.
"""

import argparse
import datetime
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdlm_megatron.chat.chat_model import DecodingRule
from sdlm_megatron.config.command_line import at_least, make_parser, threshold
from sdlm_megatron.config.secret_text import mask_text, mask_words, masked_command
from sdlm_megatron.diffusion.settings import SDLMSettings
from sdlm_megatron.errors import CheckpointError, ConfigError, UserError, run_cli
from sdlm_megatron.evaluation import vllm_server
from sdlm_megatron.evaluation.held_out import HeldOutPrompt, plain_rules, prompts_sha256, read_prompts
from sdlm_megatron.evaluation.identity import model_sha256
from sdlm_megatron.evaluation.page import write_page
from sdlm_megatron.evaluation.result_files import STOCK, read_kept, served_comparison, served_rates
from sdlm_megatron.evaluation.vllm_server import RefusedRequest, StreamedAnswer, VLLMServer
from sdlm_megatron.files import make_folder, write_json
from sdlm_megatron.report.page_kit import markdown_table
from sdlm_megatron.weights.hf_config import read_hf_config

LEAST_REQUESTS = 8  # of a measurement: fewer would show chance
WARM_TOKENS = 8  # of the answers before a measurement, which compile kernels and fill the batch
PASSES, TOKENS = "sdlm:passes_total", "sdlm:tokens_total"
RATES = {"a large GPU": 2000, "2 CPU cores and a model of 135M": 40}  # tokens per second, for the estimate
VARIABLES = {"--api-key": "VLLM_API_KEY", "--hf-token": "HF_TOKEN"}  # that vLLM reads instead of these options
EXAMPLE = """sdlm evaluate serving --model SDLM-3B-D4 --out results --vllm vllm-env/bin/vllm
sdlm evaluate serving --model SDLM-3B-D4 --out results --prompts held_out.jsonl -- --tensor-parallel-size 2
sdlm evaluate serving --model SDLM-3B-D4 --out results --url http://node1:8000 http://node2:8000"""


# --- what is measured


def built_in_prompts() -> list[HeldOutPrompt]:
    """A question about each module of Python's standard library."""
    names = sorted(name for name in sys.stdlib_module_names if not name.startswith("_"))
    return [HeldOutPrompt(f"Explain in a few sentences what Python's module {name} is for.", "") for name in names]


def rules_of(settings: SDLMSettings, thresholds: Sequence[float]) -> list[DecodingRule]:
    """Rules that the server with the plugin is measured with; without `thresholds` that of the folder.

    Lossless is among them where the model can be decoded so; the plugin may still refuse it. A window of one token is
    decoded alike by every rule.
    """
    if settings.window == 1:
        return [DecodingRule()]
    alg, n = settings.alg if settings.alg.endswith("_conf") else "prob_conf", settings.window
    rules = [DecodingRule(alg, n, tau, settings.product) for tau in thresholds or [settings.threshold]]
    lossless = [DecodingRule("lossless", n)] if settings.lossless else []
    return [*rules, *lossless, *plain_rules(settings)]


def request_fields(rule: DecodingRule | None) -> dict[str, Any]:
    """Fields of a request that choose a rule; none for a server without the plugin."""
    if rule is None:
        return {}
    options: dict[str, Any] = {"sdlm_alg": rule.alg, "sdlm_n": rule.window}
    if rule.alg.endswith("_conf"):
        options |= {"sdlm_threshold": rule.threshold, "sdlm_product": int(rule.product)}
    return {"vllm_xargs": options}


def row_key(rule: DecodingRule | None, at_once: int) -> dict[str, Any]:
    """Fields that identify a measurement."""
    rule_row = {"alg": STOCK, "n": 1, "threshold": None} if rule is None else rule.row
    return {**rule_row, "at": at_once}


# --- a measurement


def measure(
    server: VLLMServer,
    rule: DecodingRule | None,
    at_once: int,
    questions: Sequence[HeldOutPrompt],
    most: int,
) -> dict[str, Any]:
    """A row of serving.json: `first` and `seconds` of each answer in seconds, `wall` of all, `passes` of the server.

    Args:
        rule: None: of a server without the plugin.
        questions: of each request.
        most: largest number of tokens of an answer.
    """
    prompts, extra, salt = [question.text for question in questions], request_fields(rule), f"sdlm-{time.time_ns()}"
    before = 0.0 if rule is None else server.counter(TOKENS) or 0.0

    def settle(answers: Sequence[StreamedAnswer]) -> float:
        """Passes so far, once the server has counted the tokens of these answers."""
        nonlocal before
        if rule is None:
            return 0.0
        before = server.settled(TOKENS, before, sum(answer.tokens for answer in answers))
        return server.counter(PASSES) or 0.0

    passes = settle(server.ask_all(prompts[:at_once], at_once, min(most, WARM_TOKENS), extra, f"{salt}-warm"))
    cpu, clock = time.process_time(), time.perf_counter()
    answers = server.ask_all(prompts, at_once, most, extra, salt)
    wall, cpu = time.perf_counter() - clock, time.process_time() - cpu
    tokens = [answer.tokens for answer in answers]
    passes = float(sum(tokens)) if rule is None else settle(answers) - passes
    row = row_key(rule, at_once) | {"wall": round(wall, 4), "client_cpu": round(cpu / wall, 3), "passes": passes}
    row |= {"tokens": tokens, "first": [round(answer.first, 4) for answer in answers]}
    row |= {"seconds": [round(answer.seconds, 4) for answer in answers]}
    pairs = zip(answers, questions, strict=True)
    known = [int(answer.text == question.expected) for answer, question in pairs if question.expected]
    return row | ({"exact": known} if known else {})


class ServingRun:
    """The measurements of a folder, in OUT/serving.json."""

    def __init__(self, args: argparse.Namespace, argv: Sequence[str] | None) -> None:
        settings = read_hf_config(args.model).sdlm
        if settings is None:
            what = "the model is not an SDLM: its config.json has no block_size"
            raise CheckpointError(what, str(args.model), "name a folder that `sdlm export` wrote")
        self.args, self.path = args, args.out / "serving.json"
        self.questions = read_prompts(args.prompts, answered=False) if args.prompts else built_in_prompts()
        self.rules = rules_of(settings, args.thresholds)
        self.settings = {
            # a server of --url may read its weights elsewhere
            **({"model": str(args.model)} if args.url else {"model_sha256": model_sha256(args.model)}),
            "prompts": prompts_sha256(self.questions),
            "tokens": args.tokens,
            "rounds": args.rounds,
            "serve": mask_words(args.serve),
            "url": mask_words(args.url),
        }
        self.result: dict[str, Any] = {"kind": "serving", "model": str(args.model), "settings": self.settings}
        self.result |= {"facts": self._facts(settings, argv), "rows": [], "refused": {}}
        if former := read_kept(self.path, "serving", self.settings):
            self.result |= {name: former[name] for name in ("rows", "refused")}
            self.result["facts"] = former["facts"] | self.result["facts"]

    def _facts(self, settings: SDLMSettings, argv: Sequence[str] | None) -> dict[str, Any]:
        return {
            "command": f"sdlm evaluate serving {masked_command(sys.argv[1:] if argv is None else argv)}",
            "prompts": str(self.args.prompts or "built-in questions"),
            "block_size": settings.block_size,
            "causal_attn": settings.causal_attn,
            "date": datetime.date.today().isoformat(),
        }

    def missing(self, rules: Sequence[DecodingRule | None]) -> list[tuple[DecodingRule | None, int]]:
        """Measurements that serving.json does not hold yet; the rules take turns."""
        done = [{name: row[name] for name in ("alg", "n", "threshold", "at")} for row in self.result["rows"]]
        cells = [(rule, at_once) for at_once in self.args.at for rule in rules]
        return [cell for cell in cells if row_key(*cell) not in done and _name(cell[0]) not in self.result["refused"]]

    def requests(self, at_once: int) -> list[HeldOutPrompt]:
        """Questions of a measurement; they repeat where there are too few."""
        count = max(LEAST_REQUESTS, self.args.rounds * at_once)
        return [self.questions[i % len(self.questions)] for i in range(count)]

    def run(self, server: VLLMServer, cells: Sequence[tuple[DecodingRule | None, int]]) -> None:
        """Measures, and writes the file after each measurement."""
        self.result["facts"]["vllm"] = server.version()
        for number, (rule, at_once) in enumerate(cells, 1):
            if _name(rule) in self.result["refused"]:
                continue
            print(f"[{number}/{len(cells)}] {_name(rule)}, {at_once} at a time", end=": ", flush=True)
            try:
                row = measure(server, rule, at_once, self.requests(at_once), self.args.tokens)
            except RefusedRequest as problem:
                if rule is None or rule.alg != "lossless":
                    raise
                self.result["refused"][_name(rule)] = problem.what
                print(f"left out, {problem.what}", flush=True)
                continue
            self.result["rows"].append(row)
            write_json(self.path, self.result)
            print(f"{sum(row['tokens']) / row['wall']:,.1f} tokens per second, {row['wall']:.0f} s", flush=True)


def _name(rule: DecodingRule | None) -> str:
    return STOCK if rule is None else rule.name


# --- the command


@contextmanager
def open_server(args: argparse.Namespace, plugin: bool) -> Iterator[VLLMServer]:
    """A server of --url, or one that is started. UserError: it has no plugin where it should, or the reverse."""
    if args.url:
        server = VLLMServer(args.url[0 if plugin else 1])
        _check_plugin(server, plugin)
        yield server
        return
    command = vllm_server.serve_command(args.vllm, args.model, args.serve)
    log = args.out / f"serve-{'sdlm' if plugin else 'stock'}.log"
    print(f"starting {_shown(command, plugin)}; its log: {log}", flush=True)
    with vllm_server.running(command, log, plugin=plugin) as address:
        server = VLLMServer(address)
        _check_plugin(server, plugin)
        yield server


def _shown(command: Sequence[str], plugin: bool) -> str:
    """The command of a server as it would be typed."""
    return ("" if plugin else 'VLLM_PLUGINS="" ') + masked_command(command)


def _check_plugin(server: VLLMServer, plugin: bool) -> None:
    if (server.counter(PASSES) is not None) != plugin:
        what = "the server decodes without the plugin sdlm-vllm" if plugin else "the server decodes with the plugin"
        fix = "install it: pip install ./serving/vllm" if plugin else 'start it with VLLM_PLUGINS=""'
        raise UserError(what, server.address, fix)


def plan_lines(run: ServingRun, args: argparse.Namespace) -> Iterator[str]:
    """Lines of --dry-run: commands, measurements, and about how long they take."""
    most = 0
    for plugin, rules in ((True, run.rules), (False, [None])):
        cells = run.missing(rules)
        if not cells or (not plugin and len(args.url) == 1):
            continue
        if args.url:
            yield mask_text(args.url[0 if plugin else 1])
        else:
            yield _shown(vllm_server.serve_command(args.vllm, args.model, args.serve), plugin)
        for rule, at_once in cells:
            count = len(run.requests(at_once))
            most += count * args.tokens + at_once * WARM_TOKENS
            yield f"  {_name(rule)}: {count} requests, {at_once} at a time, at most {args.tokens} tokens each"
    times = ", ".join(f"{most / rate / 60:,.1f} minutes on {name} ({rate:,} tokens/s)" for name, rate in RATES.items())
    yield f"at most {most:,} tokens: about {times}" + ("" if args.url else "; and the start of two servers")


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("sdlm evaluate serving", __doc__, example=EXAMPLE)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="exported SDLM folder")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of serving.json, logs and the page")
    text = 'lines of {"prompt": …}, with "expected" to count exact answers; default: questions about Python\'s modules'
    add("--prompts", type=Path, metavar="JSONL", help=text)
    add("--at", type=at_least(1), nargs="+", default=[1, 4, 16, 64], metavar="N", help="requests at a time")
    taus = "of the server with the plugin; default: that of the folder"
    add("--thresholds", type=threshold, nargs="+", default=[], metavar="TAU", help=taus)
    add("--tokens", type=at_least(1), default=128, metavar="N", help="most tokens of an answer")
    rounds = f"requests of a measurement, in multiples of those at a time; at least {LEAST_REQUESTS} are sent"
    add("--rounds", type=at_least(1), default=4, metavar="N", help=rounds)
    program = "the program `vllm` or the Python of an environment with vLLM and sdlm-vllm"
    add("--vllm", default="vllm", metavar="PROGRAM", help=program)
    url = "running servers of the same folder, instead of starting them: with the plugin, and without it"
    add("--url", nargs="+", default=[], metavar="URL", help=url)
    add("--dry-run", action="store_true", help="print the commands, the measurements and about how long they take")
    add("serve", nargs="*", metavar="OPTION", help="options of `vllm serve` for both servers, behind --")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    if len(args.url) > 2:
        raise ConfigError(f"{len(args.url)} addresses", "--url", "name one server with the plugin and one without it")
    for option in (word.partition("=")[0].replace("_", "-") for word in args.serve):
        if option in VARIABLES:
            fix = f"set {VARIABLES[option]}=… in the environment instead, which vLLM reads"
            raise ConfigError("vLLM writes its options into its log, secrets included", f"-- {option}", fix)
    make_folder(args.out, dry=args.dry_run)
    run = ServingRun(args, argv)
    if args.dry_run:
        print("\n".join(plan_lines(run, args)))
        return
    for plugin, rules in ((True, run.rules), (False, [None])):
        cells = run.missing(rules)
        if cells and (plugin or len(args.url) != 1):
            with open_server(args, plugin) as server:
                run.run(server, cells)
    write_json(run.path, run.result)
    rates = served_rates(run.result)
    head = ["requests at a time", "decoding", "tokens/s", "of plain", "tokens per pass", "first text, s (90 %)"]
    head += ["answer, s (90 %)", "tokens per answer", "exact"]
    table = markdown_table(head, [(str(rate.at), *rate.cells) for rate in rates])
    print("", *table, "", *served_comparison(rates), sep="\n")
    write_page([args.out], [args.model.name], args.out / "index.html", "Evaluation")
    print(f"wrote {run.path} and {args.out / 'index.html'}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
