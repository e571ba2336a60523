"""What `ctkd compare` is given and what it prints."""

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from ctkd.cli import compare as cli_compare
from ctkd.compare.analysis.analyze import analyze
from ctkd.compare.plan import config as settings_of
from ctkd.compare.plan.config import CompareConfig
from ctkd.compare.report import report
from ctkd.compare.run import runner
from ctkd.compare.run.runner import Outcome
from tests.compare.fake_comparison import fake_comparison


@pytest.fixture
def given(monkeypatch, tmp_path) -> list[CompareConfig]:
    """What comparisons were begun with; none is carried out."""
    found = []
    comparison = fake_comparison(seeds=(0, 1))
    analysis = analyze(comparison, resamples=200)

    def compare(config, *, say):
        found.append(config)
        say("run 1 of 1")
        (tmp_path / "report.md").write_text("# The report\n")
        return Outcome(
            comparison=comparison, analysis=analysis, report_path=tmp_path / "report.html"
        )

    monkeypatch.setattr(runner, "compare", compare)
    monkeypatch.setattr(cli_compare, "quieten", lambda: None)
    return found


def run(*words: str) -> Result:
    return CliRunner().invoke(cli_compare.compare, list(words))


def test_without_options_the_defaults_are_compared(given):
    assert run().exit_code == 0
    assert given == [CompareConfig()]


def test_every_option_arrives(given):
    words = (
        "--losses sft,strong=uld:top_k=64 --seeds 3 --sweep sft.learning_rate=5e-5,1e-4 "
        "--sweep strong.kd_weight=0.15,1.5 --baseline strong --metric exact_match "
        "--student s --teacher t --data rows.jsonl --task text --column prompt=question "
        "--column id=key --eval-data test.jsonl --dev-data a.jsonl --dev-data b.jsonl "
        "--dev-fraction 0.2 --teacher-cache cached --live-teacher "
        "--max-steps 7 --epochs 2 --batch-size 8 "
        "--grad-accumulation 2 --learning-rate 1e-4 --warmup 0.2 --weight-decay 0.1 "
        "--max-length 99 --on-long refuse --min-coverage 0.5 --student-template chat "
        "--teacher-template chat --teacher-shots 2 --eval-limit 9 --max-new-tokens 5 "
        "--dtype bfloat16 --device cpu --seed 4 --logging-steps 3 --save-steps 6 "
        "--curve-points 2 --published a.json --published b.json --published-task fairytaleqa "
        "--output out --keep-models"
    )
    result = run(*words.split())
    assert result.exit_code == 0, result.output
    assert given == [
        CompareConfig(
            losses=("sft", "strong=uld:top_k=64"),
            seeds=3,
            sweep={"sft.learning_rate": (5e-5, 1e-4), "strong.kd_weight": (0.15, 1.5)},
            baseline="strong",
            metric="exact_match",
            dev_data=["a.jsonl", "b.jsonl"],
            dev_fraction=0.2,
            output="out",
            cache="cached",
            live_teacher=True,
            curve_points=2,
            published=("a.json", "b.json"),
            published_task="fairytaleqa",
            keep_models=True,
            common={
                "student": "s", "teacher": "t", "data": "rows.jsonl", "task": "text",
                "columns": {"prompt": "question", "id": "key"}, "eval_data": "test.jsonl",
                "max_steps": 7, "epochs": 2.0, "batch_size": 8, "grad_accumulation": 2,
                "learning_rate": 1e-4, "warmup": 0.2, "weight_decay": 0.1, "max_length": 99,
                "on_long": "refuse", "min_coverage": 0.5, "student_template": "chat",
                "teacher_template": "chat", "teacher_shots": 2, "eval_limit": 9,
                "max_new_tokens": 5, "dtype": "bfloat16", "device": "cpu", "seed": 4,
                "logging_steps": 3, "save_steps": 6,
            },
        )
    ]  # fmt: skip


def test_options_override_the_file(given, tmp_path):
    assert run("--top-k", "64").exit_code == 0
    assert given.pop().top_k == 64
    file = tmp_path / "compare.yaml"
    file.write_text(
        "losses: [sft, uld]\nseeds: 2\nmax_steps: 9\ncolumns: {prompt: question}\n"
        "sweep: {learning_rate: [1e-5, 1e-4]}\ntask: text\n"
    )
    words = ("--config", str(file), "--seeds", "3", "--epochs", "2", "--column", "id=key")
    assert run(*words).exit_code == 0
    (config,) = given
    assert (config.losses, config.seeds) == (("sft", "uld"), 3)
    assert config.common == {
        "columns": {"prompt": "question", "id": "key"}, "task": "text", "epochs": 2.0
    }  # fmt: skip
    assert config.sweep == {"learning_rate": (1e-5, 1e-4)}


def test_the_table_and_the_reports_path_are_printed_and_progress_apart(given, tmp_path):
    result = run()
    assert result.stderr == "run 1 of 1\n"
    assert result.stdout.startswith("comparison over 2 seeds\n")
    assert "untrained student" in result.stdout
    assert result.stdout.endswith(f"\nreport: {tmp_path / 'report.html'}\n")


def test_json_is_json(given, tmp_path):
    found = json.loads(run("--format", "json").stdout)
    assert found["report"] == str(tmp_path / "report.html")
    assert found["metric"] == "f1"
    assert len(found["runs"]) == 8


def test_markdown_is_the_report(given):
    assert run("--format", "markdown").stdout == "# The report\n\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--losses", "sft,udl"], "unknown loss 'udl', did you mean 'uld'?"),
        (["--sweep", "uld.kd_weight=1,2"], "add --sweep sft.learning_rate=0.002,0.004"),
        (["--sweep", "uld"], "a sweep is METHOD.SETTING=VALUE,VALUE"),
        (["--column", "id"], "a column is FIELD=COLUMN"),
        (["--metric", "bleu"], "task lm has no metric 'bleu'"),
        (["--config", "nowhere.yaml"], "cannot read the configuration nowhere.yaml"),
        (["--on-long", "cut"], "use drop or refuse"),
    ],
)
def test_what_is_given_wrongly_is_refused_before_anything_runs(given, words, said):
    result = run(*words)
    assert said in str(result.exception)
    assert given == []


def test_every_setting_has_an_option():
    options = {
        name.removeprefix("--").replace("-", "_")
        for option in cli_compare.compare.params
        for name in (*option.opts, option.name)
        if isinstance(option, click.Option)
    }
    fields = set(CompareConfig.__dataclass_fields__) - {"common"}
    shared = set(CompareConfig().base.as_dict()) - set(settings_of.NOT_SHARED)
    # They belong to a method, or to one run's folder.
    left_out = {"ce_weight", "score_eos", "keep_checkpoints", "report_to"}
    assert fields | shared - left_out <= options


def test_the_report_of_a_comparison_is_written_where_the_runner_says(tmp_path):
    comparison = fake_comparison()
    path = report.write_report(comparison, analyze(comparison, resamples=200), tmp_path)
    assert path.with_suffix(".md").is_file()
    assert isinstance(path, Path)
