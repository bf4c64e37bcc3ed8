"""Experiment E1: statistics against other forms, verdicts, committed vectors; the age of the plans of E1 and E2."""

import fcntl
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from dev.evidence import django_lines, e1, e1_measure, e1_results
from dev.evidence.e1_results import COUNTS, E1_ARMS, STEPS, Key, rules_of
from dev.evidence.e1_statistics import Crossed, crossed, gap, holm, tokens_per_pass
from dev.quickstart import pipeline
from sdlm_megatron.errors import DataError, UserError
from tests import byte_tokenizer

REPO = Path(__file__).parents[2]
SHARES = {"ar": 0.9, "d4": 0.6, "d4_nt": 0.93, "d4_causal": 0.885}
PLAN, RESULTS = "docs/evidence/preregistration_{}.md", "docs/evidence/{}"


def test_interval_is_students_where_only_seeds_or_only_prompts_differ() -> None:
    rng = np.random.default_rng(0)
    for values, axis in (
        (np.repeat(rng.normal(size=(4, 1)), 50, 1), 1),
        (np.repeat(rng.normal(size=(1, 50)), 4, 0), 0),
    ):
        estimate, sample = crossed(values), values.mean(axis)
        student = stats.ttest_1samp(sample, 0.1, alternative="greater")
        assert estimate.above(0.1) == pytest.approx(student.pvalue)
        low, high = stats.t.interval(0.95, len(sample) - 1, sample.mean(), stats.sem(sample))
        assert (estimate.interval.low, estimate.interval.high) == pytest.approx((low, high))


def test_intervals_cover_the_truth_when_seeds_and_prompts_scatter() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        d = 0.2 + rng.normal(0, 0.1, (4, 1)) + rng.normal(0, 1, 100) + rng.normal(0, 1, (4, 100))
        interval = crossed(d).interval
        hits += interval.low <= 0.2 <= interval.high
    assert 0.93 <= hits / 400 <= 0.995


def test_tokens_per_pass_agrees_with_a_jackknife_over_prompts() -> None:
    rng = np.random.default_rng(2)
    passes = np.repeat(rng.integers(2, 9, (1, 300)), 4, 0)
    tokens = passes + np.repeat(rng.integers(0, 12, (1, 300)), 4, 0)
    estimate = tokens_per_pass(tokens, passes)
    assert estimate.value == pytest.approx(tokens[0].sum() / passes[0].sum())
    left_out = (tokens[0].sum() - tokens[0]) / (passes[0].sum() - passes[0])
    jackknife = np.sqrt(299 / 300 * ((left_out - left_out.mean()) ** 2).sum())
    assert estimate.error == pytest.approx(jackknife, rel=0.02)


def test_holm_against_its_definition() -> None:
    p = {"a": 0.011, "b": 0.02, "c": 0.3, "d": 0.012}
    assert holm(p) == {
        "a": (pytest.approx(0.044), True),
        "d": (pytest.approx(0.044), True),
        "b": (pytest.approx(0.044), True),
        "c": (pytest.approx(0.3), False),
    }
    # b alone is below .05, but a comes first and stops the procedure.
    assert not any(rejected for _, rejected in holm({"a": 0.03, "b": 0.04}).values())


def test_one_seed_has_no_standard_error() -> None:
    with pytest.raises(ValueError, match="1 seed: .* needs two"):
        gap([[1, 0, 1]], [[0, 0, 1]])
    assert crossed(np.ones((4, 9))) == Crossed(1.0, 0.0, float("inf"))


def write_vectors(folder: Path, shares: dict[str, float], seeds: int = 4) -> None:
    """Vectors of all arms with these shares of exact answers at 1e-4, which is better than 3e-4."""
    rng, count = np.random.default_rng(3), 600
    folder.mkdir(parents=True, exist_ok=True)
    for arm, share in shares.items():
        for lr, part, seed in [(1e-4, "dev", 0), (3e-4, "dev", 0), *((1e-4, "test", s) for s in range(seeds))]:
            exact = (rng.random(count) < share * (0.5 if lr > 1e-4 else 1)).astype(int)
            row = {"exact": "".join(map(str, exact)), "tokens": " ".join(["12"] * count)}
            shared = {**row, "passes": " ".join(["5", "7"] * (count // 2)), "checksums": " ".join(["1"] * count)}
            key = Key(arm, lr, STEPS, seed)
            rules = dict.fromkeys(rules_of(key, part), shared)
            value = {**vars(key), "part": part, "prompts": count, "rules": rules}
            (folder / f"{key.name}-{part}.json").write_text(json.dumps(value))
    (folder / e1_results.NEW).write_text("10" * (count // 2) + "\n")


def test_verdicts_and_tables_follow_from_vectors(tmp_path) -> None:
    write_vectors(tmp_path / "v", SHARES)
    results = e1_results.read_folder(tmp_path / "v")
    assert e1_results.best_rate(results, "d4", STEPS) == 1e-4
    verdicts = {
        name: verdict for name, (_, verdict) in e1_results.verdicts(e1_results.Comparison(results, STEPS)).items()
    }
    without = {key: value for key, value in results.items() if (key[0].arm, key[0].seed) != ("d4", 3)}
    assert not e1_results.verdicts(e1_results.Comparison(without, STEPS))  # no interim test
    assert verdicts == {
        "H1": "worse by more than 3 points",
        "H2": "within 3 points",
        "H3": "not decided",
        "H4": "more than 1.5",
    }
    (tmp_path / "evidence.md").write_text(
        "before\n<!-- e1 verdicts -->\n\n<!-- end -->\nafter <!-- e1 rates -->\n<!-- end -->"
    )
    arguments = ["recompute", "--results", str(tmp_path / "v"), "--docs", str(tmp_path)]
    with pytest.raises(DataError, match="not those of the vectors"):
        e1.main([*arguments, "--check"])
    e1.main(arguments)
    e1.main([*arguments, "--check"])
    text = (tmp_path / "evidence.md").read_text()
    assert "| H2 |" in text and "| chosen |" in text and text.startswith("before")
    path = tmp_path / "v" / f"{Key('ar', 1e-4, STEPS, 0).name}-test.json"
    path.write_text(path.read_text().replace('"prompts": 600', '"prompts": 601'))
    with pytest.raises(DataError, match="not 601"):
        e1_results.read_folder(tmp_path / "v")


def test_phases_follow_the_results(tmp_path) -> None:
    """The best rate is the smallest so far, so the next smaller one is tried; then seeds, arm after arm."""
    arms = [arm for arm in COUNTS if arm != "d16_nt"]
    write_vectors(tmp_path / "results", dict.fromkeys(arms, 0.5), seeds=1)
    campaign = e1.LineCampaign(tmp_path, tmp_path, e1.Design())
    phases = dict(campaign.phases())
    first = [(job.key.arm, job.key.lr) for job in phases["learning rates of ar and d4"]]
    assert first == [("ar", 3e-4), ("d4", 3e-4), ("ar", 1e-3), ("d4", 1e-3)]
    for two in (arms[:2], arms[2:]):
        names = " and ".join(two)
        further = [job.key.name for job in phases[f"further rates of {names}"] if campaign.missing(job)]
        assert further == [f"{arm}-3e-05-150-0" for arm in two]
        assert [job.key.name for job in phases[f"seed 0 of {names}"]] == [f"{arm}-1e-04-150-0" for arm in two]
    assert [job.key.name for job in phases["comparison"]][:5] == [*(f"{a}-1e-04-150-0" for a in arms), "ar-1e-04-150-1"]
    steps = {(job.key.arm, job.key.steps) for job in phases["budgets"]}
    assert {("ar", 300), ("d4_nt", 1200), ("d16_nt", 600)} <= steps
    assert all(E1_ARMS[arm].name == arm for arm in COUNTS)
    assert (e1.around(3e-5), e1.around(3e-4), e1.around(3e-3)) == ((3e-5, 1e-4), (1e-4, 3e-4, 1e-3), (1e-3, 3e-3))


def test_committed_vectors_are_not_measured_again(tmp_path, capsys) -> None:
    write_vectors(tmp_path / "committed", {"ar": 0.5}, seeds=1)
    e1.take_measured(tmp_path / "committed", tmp_path / "results")
    assert "3 measured models" in capsys.readouterr().out
    campaign = e1.LineCampaign(tmp_path, tmp_path, e1.Design())
    assert not campaign.missing(e1.LineJob(Key("ar", 1e-4, STEPS, 0), "test"))
    assert campaign.missing(e1.LineJob(Key("ar", 1e-4, STEPS, 1), "test"))
    own = tmp_path / "results" / f"{Key('ar', 1e-4, STEPS, 0).name}-test.json"
    own.write_text("{}")
    e1.take_measured(tmp_path / "committed", tmp_path / "results")
    assert own.read_text() == "{}" and capsys.readouterr().out == ""


def test_no_table_before_all_models_are_measured(tmp_path) -> None:
    write_vectors(tmp_path, SHARES, seeds=3)
    assert set(e1_results.tables(tmp_path, STEPS).values()) == {""}
    write_vectors(tmp_path, SHARES)
    made = e1_results.tables(tmp_path, STEPS)
    assert all(made.values())
    # A fifth of the checksums of one rule of one model is changed, then the rule removed.
    path = tmp_path / Key("d4_causal", 1e-4, STEPS, 2).file("test")
    value = json.loads(path.read_text())
    value["rules"]["lossless"]["checksums"] = " ".join(["1", "1", "2", "1", "1"] * 120)
    path.write_text(json.dumps(value))
    changed = e1_results.tables(tmp_path, STEPS)
    assert "| 2 | 600 | 120 |" in changed["lossless"] and "| 3 | 600 | 0 |" in changed["lossless"]
    assert "| 2 | 300 | 60 |" in changed["unseen_lossless"]
    assert {name for name in made if made[name] != changed[name]} == {"lossless", "unseen_lossless"}
    del value["rules"]["p90"]
    path.write_text(json.dumps(value))
    assert set(e1_results.tables(tmp_path, STEPS).values()) == {""}


def copy_vectors(folder: Path, old: Key, new: Key) -> list[int]:
    """The test vectors of one model as those of another; returns which answers at τ = .98 are exact."""
    value = json.loads((folder / old.file("test")).read_text())
    rules = {rule: value["rules"][rule] for rule in rules_of(new, "test")}
    (folder / new.file("test")).write_text(json.dumps({**value, **vars(new), "rules": rules}))
    return [int(digit) for digit in value["rules"]["p98"]["exact"]]


def wilson(exact: list[int]) -> str:
    n, p, z = len(exact), sum(exact) / len(exact), stats.norm.ppf(0.975)
    middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    return f"{p:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def test_results_of_one_seed_have_intervals_over_the_prompts(tmp_path) -> None:
    """Self-speculative decoding, D = 16 and the budgets; the sum of rates of a budget, step by step."""
    write_vectors(tmp_path, SHARES)
    exact = copy_vectors(tmp_path, Key("d4", 1e-4, STEPS, 0), Key("d4", 1e-4, 8 * STEPS, 0))
    copy_vectors(tmp_path, Key("d4_nt", 1e-4, STEPS, 0), Key("d16_nt", 1e-4, STEPS, 0))
    made = e1_results.tables(tmp_path, STEPS)
    speed = r"2\.00 \(1\.9\d to 2\.0\d\)"
    assert re.search(rf"D = 4 \| self-speculative \| 1 \| {re.escape(wilson(exact))} \| {speed} \|", made["main"])
    assert len(re.findall(rf"self-speculative \| 1 \| [\d.]+% \(.*?\) \| {speed}", made["main"])) == 3
    assert re.search(rf"D = 16, .*? \| τ = \.98 \| 1 \| [\d.]+% \(.*?\) \| {speed}", made["main"])
    for steps, seeds in ((150, 4), (1200, 1)):
        warmup, decay = steps // 8, 2 * steps // 5
        factors = [min(1, step / warmup, (steps + 1 - step) / decay) for step in range(1, steps + 1)]
        assert f"| SDLM, D = 4 | τ = .98 | {steps:,} | 1e-4 | {1e-4 * sum(factors):.3g} | {seeds} |" in made["budget"]
    assert f"| 1 | {wilson(exact)} |" in made["budget"] and "| 0.0112 | 4 |" in made["budget"]
    assert f"| 1 | {wilson(exact[::2])} |" in made["unseen_budget"]


def test_unseen_prompts_decide_nothing_and_every_table_has_its_place(tmp_path) -> None:
    write_vectors(tmp_path, SHARES)
    made = e1_results.tables(tmp_path, STEPS)
    assert "p (Holm) | verdict |" in made["verdicts"] and "within 3 points" in made["verdicts"]
    unseen = {name: text for name, text in made.items() if name.startswith("unseen_")}
    assert not re.search("Holm|verdict|within|worse|decided|more than", "".join(unseen.values()))
    assert "| degrees of freedom |" in unseen["unseen_hypotheses"]
    assert {f"unseen_{name}" for name in ("main", "differences", "lossless", "budget")} < set(unseen)
    document = (REPO / "docs" / "evidence.md").read_text()
    assert sorted(re.findall(r"<!-- e1 (\w+) -->", document)) == sorted(made)
    assert "| SDLM, D = 4: τ = .98 | autoregressive" not in made["differences"]  # that is H1
    assert "| SDLM, D = 4: τ = .98 | SDLM, D = 4: τ = .9 |" in made["differences"]


@pytest.fixture
def campaign(tmp_path) -> e1.LineCampaign:
    """A campaign with 600 prompts and the base's tokenizer, without weights."""
    (tmp_path / "data").mkdir()
    for part, count in (("train", 9), ("dev", 600), ("test", 600)):
        (tmp_path / "data" / f"{part}.jsonl").write_text('{"prompt": "a", "expected": "b"}\n' * count)
    byte_tokenizer.write_folder(tmp_path / "base")
    return e1.LineCampaign(tmp_path, tmp_path / "base", e1.Design())


def test_training_that_is_not_finite_counts_as_no_exact_answer(campaign, monkeypatch, capsys) -> None:
    codes = {"sdlm_megatron.train": 3}

    def done(words: list[str], **_: object) -> SimpleNamespace:
        return SimpleNamespace(returncode=next((codes[word] for word in words if word in codes), 0))

    monkeypatch.setattr(pipeline, "subprocess", SimpleNamespace(run=done))
    results = campaign.out / "results"
    write_vectors(results, SHARES)
    lost = [("ar", 1e-3, "dev", 0), ("d4", 1e-4, "test", 2), *(("d4_causal", 1e-4, "test", seed) for seed in range(4))]
    for arm, lr, part, seed in lost:
        job = e1.LineJob(Key(arm, lr, STEPS, seed), part)
        campaign.do(job)
        assert not campaign.missing(job) and f"{job.key.name} did not train" in capsys.readouterr().out
        vectors = e1_measure.read_vectors(results / job.key.file(part))
        assert vectors["diverged"] and not any(vectors["rules"][job.rules[-1]]["exact"])
    assert campaign.rate("ar") == 1e-4
    made = e1_results.tables(results, STEPS)
    assert "| SDLM, D = 4 | τ = .98 | 4 (1 did not train) | 4" in made["main"]
    assert made["main"].count("| 4 | did not train | – |") == 4 and "| 1 | did not train | – |" in made["main"]
    assert "| autoregressive (D = 1) | 1e-3 | n = 1 | did not train |  |" in made["rates"]
    assert "| 2 | 600 | did not train |" in made["lossless"]
    assert re.search(r"H3 .* \| 1\.0000 \| worse by more than 3 points", made["verdicts"])
    assert "nan" not in "".join(made.values())
    codes["sdlm_megatron.train"] = 1
    job = e1.LineJob(Key("ar", 1e-3, STEPS, 1), "test")
    with pytest.raises(UserError, match="exit code 1"):
        campaign.do(job)
    assert campaign.missing(job)


def test_stopped_training_is_no_model_and_a_whole_export_is_kept(campaign, monkeypatch) -> None:
    job, words = e1.LineJob(Key("ar", 1e-3, STEPS, 0), "test"), []
    folder = campaign.out / "models" / job.key.name
    (folder / "ckpt").mkdir(parents=True)
    events = [{"time": 1.0, "kind": "stop", "step": 50}, {"time": 2.0, "kind": "saved", "step": 50}]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))

    def run(command: list[str], **_: object) -> SimpleNamespace:
        words.extend(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(pipeline, "subprocess", SimpleNamespace(run=run))
    with pytest.raises(UserError, match=r"stopped after step 50\n.*log.txt\n.*continues"):
        campaign.do(job)
    assert (folder / "ckpt").exists() and "export" not in words and not (folder / "facts.json").exists()
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"time": 3.0, "kind": "finished", "step": 150}\n')
    (folder / "hf").mkdir()  # exported by a start that was killed before it wrote facts.json
    campaign.do(job)
    assert "export" not in words and "dev.evidence.e1_measure" in words and not (folder / "ckpt").exists()


def test_second_campaign_in_a_folder_is_refused(campaign, monkeypatch) -> None:
    monkeypatch.setattr(campaign, "phases", lambda: iter(()))
    with open(campaign.out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process runs this campaign"):
            campaign.run(jobs=1)
    campaign.run(jobs=1)


def test_test_prompts_are_answered_with_the_rate_of_dev(tmp_path) -> None:
    write_vectors(tmp_path, {"ar": 0.9, "d4": 0.6})
    path = tmp_path / Key("d4", 1e-4, STEPS, 0).file("test")
    other = Key("d4", 3e-4, STEPS, 0)
    (tmp_path / other.file("test")).write_text(path.read_text().replace('"lr": 0.0001', '"lr": 0.0003'))
    with pytest.raises(DataError, match=r"another learning rate.*\n.*d4-3e-04-150-0-test.json"):
        e1_results.tables(tmp_path, STEPS)


def test_results_are_committed_once_and_whole(tmp_path, capsys) -> None:
    out, folder = tmp_path / "out", tmp_path / "committed"
    write_vectors(out / "results", {"ar": 0.9, "d4": 0.6}, seeds=1)
    (out / "data").mkdir()
    for part in ("train", "test"):
        (out / "data" / f"{part}.jsonl").write_text('{"prompt": "a", "expected": "b", "line": 1}\n')
    path = out / "results" / Key("d4", 1e-4, STEPS, 0).file("test")
    value = json.loads(path.read_text())
    whole = dict(value["rules"])
    del value["rules"]["p90"]
    path.write_text(json.dumps(value))
    words = ["collect", "--out", str(out), "--results", str(folder)]
    e1.main(words)
    assert "5 complete results" in capsys.readouterr().out and not (folder / path.name).exists()
    path.write_text(json.dumps({**value, "rules": whole}))
    e1.main(words)
    kept = (folder / path.name).read_text()
    path.write_text(json.dumps({**value, "rules": whole, "train_seconds": 1}))
    with pytest.raises(DataError, match="measured this model again"):
        e1.main(words)
    assert (folder / path.name).read_text() == kept


def test_rules_of_another_model_are_measured_again(tmp_path) -> None:
    measured: list[str] = []

    def measure(name: str) -> dict[str, str]:
        measured.append(name)
        return {"exact": "1", "tokens": "2", "passes": "1", "checksums": "3"}

    about = {"weights": "a", "prompts": 1}
    for names, facts in ((["n1"], about), (["n1", "p98"], about), (["n1", "p98"], {**about, "weights": "b"})):
        e1_measure.measure_rules(tmp_path / "v.json", names, facts, measure)
    assert measured == ["n1", "p98", "n1", "p98"]
    assert e1_measure.read_vectors(tmp_path / "v.json")["weights"] == "b"


def test_data_set_is_split_in_order_and_checked(tmp_path) -> None:
    (tmp_path / "django").mkdir()
    (tmp_path / "django" / "all.anno").write_text("  set x\x0c to  1.\n" + "y" * 501 + "\n")
    (tmp_path / "django" / "all.code").write_text("    x = 1\n y\n")
    rows = django_lines.read_lines(tmp_path, checked=False)
    assert rows[0] == {"prompt": "set x to 1.", "expected": "x = 1", "line": 1}
    assert django_lines.part_rows(rows, "train") == rows[:1]
    with pytest.raises(DataError, match="SHA-256 differs"):
        django_lines.read_lines(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        django_lines.read_lines(tmp_path / "django")


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(REPO), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


@pytest.mark.parametrize("experiment", ["e1", "e2"])
def test_plan_is_older_than_the_first_result_and_was_only_added_to(experiment: str) -> None:
    if git("rev-parse", "--is-shallow-repository").strip() == "true":
        pytest.skip("a shallow clone has no history")
    plan = PLAN.format(experiment)
    added = git("log", "--diff-filter=A", "--format=%H", "--", plan).split()
    assert added, "the plan is not committed"
    first = added[-1]
    assert git("show", "--name-only", "--format=", first).split() == [plan]
    assert (REPO / plan).read_text().startswith(git("show", f"{first}:{plan}"))
    last = git("log", "-1", "--format=%H", "--", plan).strip()
    results = git("log", "--diff-filter=A", "--format=%H", "--", RESULTS.format(experiment)).split()
    for result in results[-1:]:
        assert last != result and last in git("rev-list", result).split()


def test_tables_of_the_document_are_those_of_the_vectors() -> None:
    e1.main(["recompute", "--check", "--results", str(REPO / RESULTS.format("e1")), "--docs", str(REPO / "docs")])
