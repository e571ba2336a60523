"""A comparison carried out run by run, so that it can be stopped at any moment.

Everything that was computed is on disk before the next thing begins. A comparison that was stopped
is started again with the same settings: it looks up what is there and goes on.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ctkd.compare.analysis.analyze import Analysis, analyze
from ctkd.compare.plan.config import CompareConfig
from ctkd.compare.plan.jobs import Job, Plan, Training, best_trial, settings_text
from ctkd.compare.records import TEACHER, UNTRAINED, Answer, Comparison, Record
from ctkd.compare.report.published import PublishedTable, read_published
from ctkd.compare.report.report import write_report
from ctkd.compare.run.evaluating import Evaluator, means, scored
from ctkd.compare.run.folder import ComparisonFolder, append_record, read_records
from ctkd.compare.run.preparation import Prepared, prepare
from ctkd.distill.data.tasks import get_task
from ctkd.distill.devices import give_back_freed_memory
from ctkd.distill.evaluation.metrics import GIVEN_BITS
from ctkd.distill.models.from_config import described
from ctkd.distill.preparing import teacher_form
from ctkd.distill.printable import duration
from ctkd.distill.teachers.memory import KnownStates
from ctkd.distill.training.card import CARD
from ctkd.distill.training.checkpoints import Checkpoints
from ctkd.distill.training.output_folder import RECORD, OutputFolder
from ctkd.distill.training.run import Interrupted, train
from ctkd.errors import DataError, TrainingError

__all__ = ["Outcome", "RunProgress", "compare"]

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
# What a run reads, all of which the key in its folder's name stands for.
_PLACES = ("student", "data", "eval_data", "teacher_cache")
_DRAWN = (
    "random, others for each seed, the same for all methods of a seed; one tokenizer for all. "
    "The untrained student is that of the first seed"
)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of a comparison.

    Args:
        comparison: All records.
        analysis: What they show.
        report_path: Where the report is.
    """

    comparison: Comparison
    analysis: Analysis
    report_path: Path


def compare(config: CompareConfig, *, say: Say = print) -> Outcome:
    """Train the same student with several losses on equal terms, and report how they did.

    The output folder holds ``results.jsonl`` with a line for everything that was measured, the rows
    in ``data``, the teacher cache in ``teacher``, a folder per run in ``runs``, and the report.
    Called again with the same settings it does what is not done yet; losses and seeds may be added.
    Of a run that was killed at most ``save_steps`` steps are repeated.

    Args:
        config: The settings.
        say: Prints one line of progress.

    Raises:
        Interrupted: If the user stopped it; called again it goes on.
        CtkdError: If something that was given cannot be used.
    """
    published = [read_published(path) for path in config.published]
    with ComparisonFolder.opened(config) as folder:
        config = folder.dated(config)
        prepared = prepare(config, folder, say)
        costs = [f"{name} {duration(took)}" for name, took in folder.preparation.items()]
        say(f"done once, before any run: {', '.join(costs)}")
        return _Comparing(config, folder, prepared, say).outcome(published)


class _Comparing:
    def __init__(
        self, config: CompareConfig, folder: ComparisonFolder, prepared: Prepared, say: Say
    ) -> None:
        self.config, self.folder, self.prepared, self.say = config, folder, prepared, say
        self.records = read_records(folder.path)
        # A live teacher reads the rows that all runs share once.
        self.teacher_states = KnownStates()
        self.plan = Plan(
            config,
            prepared.splits,
            prepared.fingerprints,
            students=prepared.students,
            cache=None if config.is_live else prepared.cache,
            texts=prepared.cache,
        )
        # Where weights were drawn, all students are read as the first.
        first = prepared.students[config.base.seed]
        base = replace(config.base, student=first, student_config=None)
        self.evaluator = Evaluator(base, prepared.student_tokenizer, say)
        self.progress = RunProgress(say)

    def outcome(self, published: Sequence[PublishedTable]) -> Outcome:
        references = self._references()
        trials = self.plan.trials()
        chosen: dict[str, dict[str, Any]] = {one.name: {} for one in self.config.methods}
        # Which settings win decides which runs follow, but not how many.
        self.progress.expect([*trials, *self.plan.finals(self._first_points())])
        for job in trials:
            self._try(job)
            self._tidy(trials)
        if trials:
            trials = [job for job in trials if job.key in self.records]
            chosen = self._choose(trials)
        finals = self.plan.finals(chosen)
        self._tidy([*trials, *finals])
        for job in finals:
            self._do(job)
            self._tidy([*trials, *finals])
        comparison = Comparison(
            settings=self._settings(),
            metric=self.config.metric_name,
            baseline=self.config.baseline_name,
            references=tuple(references),
            finals=tuple(self.records[job.key] for job in finals),
            trials=tuple(self.records[job.key] for job in trials),
            preparation=dict(self.folder.preparation),
        )
        analysis = analyze(comparison)
        path = write_report(comparison, analysis, self.folder.path, published=published)
        return Outcome(comparison=comparison, analysis=analysis, report_path=path)

    def _first_points(self) -> dict[str, dict[str, Any]]:
        return {method.name: method.points()[0] for method in self.config.methods}

    def _references(self) -> list[Record]:
        """Records of the untrained student and the teacher."""
        test = self.prepared.splits.test
        base = self.config.base

        def untrained() -> tuple[tuple[Answer, ...], dict[str, float]]:
            doing = "answering" if get_task(base.task).answered else "reading"
            self.say(f"the untrained student, {base.student}: {doing} the test split")
            student = self.prepared.students[base.seed]
            return self.evaluator.measure(student, self.folder.path / "untrained", test)

        def teacher() -> tuple[tuple[Answer, ...], dict[str, float]]:
            texts, answers = self.prepared.teacher_texts, None
            if texts is not None:
                answers = scored(test.examples, texts)
                if self.config.metric_name != GIVEN_BITS:
                    return answers, {}
            self.say(f"the teacher, {base.teacher}: reading the test split")
            form = teacher_form(self.config.teacher_base, self.prepared.splits.train.examples)
            tokenizer = self.prepared.teacher_tokenizer
            return self.evaluator.measure_teacher(tokenizer, test, form, answers), {}

        references = []
        for name, measure in ((UNTRAINED, untrained), (TEACHER, teacher)):
            key = self.plan.reference_key(name)
            if key not in self.records:
                answers, losses = measure()
                self._keep(
                    Record(
                        key=key,
                        method=name,
                        stage="reference",
                        split="test",
                        seed=None,
                        settings={"model": base.student if name == UNTRAINED else base.teacher},
                        varied={},
                        metrics=means(answers),
                        answers=answers,
                        losses=losses,
                    )
                )
            references.append(self.records[key])
        return references

    def _try(self, job: Job) -> None:
        """As `_do`, for a trial: that it diverges is an answer, too."""
        diverged = self.folder.record.get("diverged trials", {})
        if job.title in diverged:
            return
        try:
            self._do(job)
        except TrainingError as error:
            self.say(f"{error}; this trial is passed over")
            self.folder.keep("diverged trials", {**diverged, job.title: str(error)})
            Checkpoints(job.training.folder, self.say).remove()

    def _do(self, job: Job) -> None:
        """Train what is not trained, measure it, and keep the record."""
        if job.key in self.records:
            self.progress.skip(job, self.records[job.key].seconds)
            return
        splits = self.prepared.splits
        rows = splits.dev if job.split == "dev" else splits.test
        if rows is None:
            raise DataError("there is no development split to try settings on")
        with self.progress.at(job):
            try:
                trained = self._trained(job.training)
            except TrainingError as error:
                raise TrainingError(f"{job.title}: {error}") from error
            results = trained.results
            self._note(trained.record.get("environment", {}))
            answers, losses = self.evaluator.measure(
                str(job.training.folder), job.training.folder, rows
            )
            self._keep(
                Record(
                    key=job.key,
                    method=job.method.name,
                    stage=job.stage,
                    split=job.split,
                    seed=job.seed,
                    settings=job.training.settings,
                    varied=job.varied,
                    metrics=means(answers),
                    answers=answers,
                    losses=losses,
                    history=_history(results["history"]),
                    steps=results["steps"],
                    seconds_per_step=results.get("seconds per step"),
                    seconds=results["training seconds"],
                    peak_memory=results.get("peak memory"),
                )
            )

    def _trained(self, training: Training) -> OutputFolder:
        path = training.folder
        if path.exists() and not (path / RECORD).is_file():
            # Killed before the run's first file was whole: nothing is lost.
            shutil.rmtree(path)
        settings = training.config.as_dict()
        if path.exists():
            # The folder may have been moved, or called otherwise; its name vouches for the rows.
            OutputFolder.relocate(path, {name: settings[name] for name in _PLACES})
        folder = OutputFolder.check(path, settings, resume=True, overwrite=False)
        lost = "finished" in folder.results and not any(
            weights for pattern in _WEIGHTS for weights in path.glob(pattern)
        )
        if "finished" in folder.results and not lost:
            return folder
        try:
            # Else a run would be charged with what runs before it had needed.
            give_back_freed_memory()
            return train(
                training.config,
                resume=not lost,
                overwrite=lost,
                say=self.say,
                teacher_states=self.teacher_states,
            )
        except Interrupted as error:
            stopped = str(error).split(";")[0]
            raise Interrupted(
                f"{stopped} of a run; repeat the same command to go on with the comparison"
            ) from error
        finally:
            gc.collect()

    def _note(self, environment: dict[str, Any]) -> None:
        """Keep what a run was trained with; a comparison may go on elsewhere."""
        before = self.folder.record.get("environment", {})
        merged = {
            name: list(dict.fromkeys([*before.get(name, []), value]))
            for name, value in environment.items()
        }
        if {**before, **merged} != before:
            self.folder.keep("environment", {**before, **merged})

    def _keep(self, record: Record) -> None:
        append_record(self.folder.path, record)
        self.records[record.key] = record

    def _choose(self, trials: Sequence[Job]) -> dict[str, dict[str, Any]]:
        """The settings of each method that did best on the development split."""
        metric = self.config.metric_name
        best = {}
        for method in self.config.methods:
            done = [self.records[job.key] for job in trials if job.method.name == method.name]
            if not done:
                raise TrainingError(
                    f"all trials of {method.name} have diverged; give it others with --sweep, in "
                    "another --output"
                )
            best[method.name] = best_trial(done, metric)
        before = self.folder.record.get("choices", {})
        choices = {
            name: {"varied": trial.varied, metric: trial.metrics[metric], "trial": trial.key}
            for name, trial in best.items()
        }
        self.folder.keep("choices", {**before, **choices})
        for name, trial in best.items():
            self.say(f"chosen for {name} on the development split: {settings_text(trial.varied)}")
        return {name: dict(trial.varied) for name, trial in best.items()}

    def _tidy(self, jobs: Sequence[Job]) -> None:
        """Delete the weights of runs that nothing will be asked of any more."""
        if self.config.keep_models:
            return
        needed = {job.training.key for job in jobs if job.key not in self.records}
        if all(job.stage == "trial" for job in jobs):
            needed |= self._leading(jobs)
        for training in {job.training.key: job.training for job in jobs}.values():
            if training.key not in needed and training.folder.is_dir():
                Checkpoints(training.folder, self.say).remove()
                # The card says how to load them.
                for pattern in (*_WEIGHTS, CARD):
                    for file in training.folder.glob(pattern):
                        file.unlink()

    def _leading(self, trials: Sequence[Job]) -> set[str]:
        """Runs that may still be reported: each method's best trial so far."""
        leading = set()
        for method in self.config.methods:
            done = [
                job for job in trials if job.method.name == method.name and job.key in self.records
            ]
            if done:
                best = best_trial([self.records[job.key] for job in done], self.config.metric_name)
                leading |= {job.training.key for job in done if job.key == best.key}
        return leading

    def _settings(self) -> dict[str, Any]:
        """Settings that all runs share."""
        config, splits = self.config, self.prepared.splits
        own = {name for method in config.methods for name in (*method.settings, *method.grid)}
        # Weights are the loss's own where none is given: records have them.
        left_out = own | {"seed", "max_steps", "epochs", "loss_options", "ce_weight"}
        recorded = self.folder.record["settings"]
        environment = self.folder.record.get("environment", {})
        diverged = self.folder.record.get("diverged trials", {})
        cuts = {"development split": splits.dev, "test split": splits.test}
        return {
            **{
                name: value
                for name, value in recorded.items()
                if name in config.base.as_dict() and name not in left_out
            },
            "max_steps": self.plan.steps,
            "seeds": list(config.seed_values),
            "training rows": len(splits.train.examples),
            "development rows": 0 if splits.dev is None else len(splits.dev.examples),
            "test rows": len(splits.test.examples),
            **{name: one.cut for name, one in cuts.items() if one is not None and one.cut},
            **({"not held out": splits.shared} if splits.shared else {}),
            "curve rows": len(splits.curve.examples),
            "teacher logits": self.prepared.teacher_logits,
            **self._initial_weights(),
            **({} if config.published_task is None else {"published task": config.published_task}),
            **({"diverged trials": ", ".join(diverged)} if diverged else {}),
            "ctkd": self.folder.record["ctkd"],
            **{name: ", ".join(values) for name, values in environment.items()},
        }

    def _initial_weights(self) -> dict[str, str]:
        """A line of the settings, where a comparison draws its students' weights."""
        if self.config.base.student_config is None:
            return {}
        drawn = described(Path(next(iter(self.prepared.students.values()))))
        return {"initial weights": f"{drawn}; {_DRAWN}"}


def _history(logged: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The logs of steps, without the trainer's own timings, which a resumed run counts anew."""
    return tuple(
        {
            name: value
            for name, value in entry.items()
            if not name.endswith(("_runtime", "_per_second"))
        }
        for entry in logged
        if "ce" in entry or "eval_ce" in entry
    )


class RunProgress:
    """Counts runs; several measurements of one run count once.

    Args:
        say: Prints one line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._started = time.perf_counter()
        self._total = 0
        self._seen: set[str] = set()
        self._seconds: list[float] = []

    def expect(self, jobs: Sequence[Job]) -> None:
        """Learn how many runs there will be."""
        self._total = len({job.training.key for job in jobs})

    def skip(self, job: Job, seconds: float) -> None:
        """Count a run that is there already, and took so long to train."""
        if job.training.key not in self._seen:
            self._seen.add(job.training.key)
            self._seconds.append(seconds)

    @contextmanager
    def at(self, job: Job) -> Iterator[None]:
        """Announce a measurement, and learn how long it took."""
        if job.training.key in self._seen:
            self._say(f"{job.title}: on the {job.split} split")
            yield
            return
        before = len(self._seen)
        line = f"run {before + 1} of {self._total}: {job.title}"
        began = time.perf_counter()
        line += f"; {duration(began - self._started)} so far"
        if self._seconds:
            rest = statistics.fmean(self._seconds) * (self._total - before)
            line += f", about {duration(rest)} to go"
        self._say(line)
        yield
        self._seen.add(job.training.key)
        self._seconds.append(time.perf_counter() - began)
