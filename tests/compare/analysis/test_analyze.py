import dataclasses
import json
import re

import numpy as np
import pytest

from ctkd.compare.analysis.analyze import analyze
from ctkd.compare.analysis.statistics import (
    cluster_bootstrap,
    holm,
    seed_interval,
    smallest_detectable_difference,
)
from ctkd.compare.records import TEACHER, UNTRAINED, Answer, Comparison, Record
from ctkd.errors import DataError, SettingError

CLUSTERS, EACH = 20, 3
GROUPS = tuple(f"story {place}" for place in range(CLUSTERS) for _ in range(EACH))
RANKING = re.compile(r"better|worse|best|beats|wins|undecided|differs|Holm", re.IGNORECASE)


def answers(scores, groups=GROUPS):
    return tuple(
        Answer(
            id=f"q{place}",
            group=groups[place],
            prompt="?",
            prediction="!",
            references=("!",),
            scores={"f1": float(score), "exact_match": float(score) / 2, "rouge_lsum": 1.0},
        )
        for place, score in enumerate(scores)
    )


def run(method, seed, scores, groups=GROUPS, **fields):
    return Record(
        key=f"{method} {seed}",
        method=method,
        stage="reference" if seed is None else "final",
        split="test",
        seed=seed,
        settings={},
        varied={},
        metrics={},
        answers=answers(scores, groups),
        **fields,
    )


def compared(finals, references=(), baseline="sft", metric="f1"):
    return Comparison(
        settings={},
        metric=metric,
        baseline=baseline,
        references=tuple(references),
        finals=tuple(finals),
    )


def noisy(shifts, seeds=(0, 1, 2), spread=6.0, groups=GROUPS):
    """Runs whose mean is 50 and the method's shift, with an effect of cluster and of example."""
    generator = np.random.default_rng(0)
    effects = {group: generator.normal(0, 8) for group in groups}
    easy = np.array([effects[group] for group in groups])
    return [
        run(method, seed, 50 + shift + easy + generator.normal(0, spread, len(groups)), groups)
        for method, shift in shifts.items()
        for seed in seeds
    ]


SHIFTS = {"sft": 0.0, "uld": 8.0, "mined": 0.2, "alm": -8.0}


def by_method(analysis):
    return {found.method: found for found in (*analysis.methods, *analysis.references)}


def text(analysis):
    return "\n".join(analysis.sentences())


def test_difference_is_paired_by_seed_and_example():
    finals = noisy(SHIFTS)
    found = by_method(analyze(compared(finals)))["uld"].difference
    scores = {
        (one.method, one.seed): np.array([answer.scores["f1"] for answer in one.answers])
        for one in finals
    }
    each = [scores["uld", seed] - scores["sft", seed] for seed in range(3)]
    boot = cluster_bootstrap(sum(each) / 3, GROUPS)
    assert found.mean == pytest.approx(np.mean(each))
    assert found.seed_means == pytest.approx([one.mean() for one in each])
    assert found.seeds == (0, 1, 2)
    assert found.interval == pytest.approx(boot.interval(0.95))
    assert found.standard_error == pytest.approx(boot.standard_error)
    assert found.p_value == pytest.approx(boot.p_value)
    assert found.seed_interval == pytest.approx(seed_interval(list(found.seed_means)))
    expected = smallest_detectable_difference(
        boot.standard_error, comparisons=3, degrees=CLUSTERS - 1
    )
    assert found.smallest_detectable == pytest.approx(expected)


def test_verdicts_follow_holm_over_the_methods_alone():
    finals = noisy(SHIFTS)
    references = [run(UNTRAINED, None, [5.0] * 60), run(TEACHER, None, [90.0] * 60)]
    analysis = analyze(compared(finals, references))
    found = by_method(analysis)
    differences = {name: one.difference for name, one in found.items() if one.difference}
    assert {name: one.verdict for name, one in differences.items()} == {
        "uld": "better",
        "mined": "undecided",
        "alm": "worse",
    }
    adjusted = holm([one.p_value for one in differences.values()])
    assert tuple(one.adjusted_p_value for one in differences.values()) == adjusted
    for one in differences.values():
        assert one.adjusted_interval.excludes_zero == (one.adjusted_p_value <= 0.05)
    assert sorted(one.adjusted_level for one in differences.values()) == pytest.approx(
        [0.95, 1 - 0.05 / 2, 1 - 0.05 / 3]
    )
    assert found["sft"].difference is None
    assert found[UNTRAINED].difference is found[TEACHER].difference is None
    assert analysis.comparisons == 3
    assert "Holm's correction over 3 comparisons at 0.05, uld is better than sft." in text(analysis)
    assert "alm is worse than sft." in text(analysis)
    assert "mined is undecided, which does not show that it equals sft." in text(analysis)


def test_holm_makes_a_difference():
    """One method alone passes; beside five that do not differ, the same runs do not."""
    alone = {"sft": 0.0, "uld": 1.2}
    many = alone | {f"other {place}": 0.0 for place in range(5)}
    few, more = (by_method(analyze(compared(noisy(shifts)))) for shifts in (alone, many))
    assert few["uld"].difference.p_value == more["uld"].difference.p_value < 0.05
    assert few["uld"].difference.verdict == "better"
    assert more["uld"].difference.verdict == "undecided"
    wide, narrow = (found["uld"].difference.adjusted_interval for found in (more, few))
    assert wide.low <= 0 < narrow.low


def test_nothing_differs_is_said():
    analysis = analyze(compared(noisy({"sft": 0.0, "uld": 0.1})))
    assert "no method differs from sft; this does not show that they are equally good" in text(
        analysis
    )
    assert not re.search(r"is better|are better|worse", text(analysis))


@pytest.mark.parametrize("shift", [0.0, 40.0])
def test_demonstration_never_ranks(shift):
    shifts = {"sft": 0.0, "uld": shift, "alm": -shift}
    references = [run(UNTRAINED, None, [5.0] * 60), run(TEACHER, None, [90.0] * 60)]
    analysis = analyze(compared(noisy(shifts, seeds=(3,)), references))
    assert analysis.heading == "demonstration, no ranking"
    assert analysis.is_demonstration
    for found in analysis.methods[1:]:
        assert found.difference.verdict == "not tested"
        assert found.difference.p_value is found.difference.adjusted_p_value is None
        assert found.difference.adjusted_interval is found.difference.seed_interval is None
        assert found.difference.interval is not None
    assert not RANKING.search(text(analysis))
    assert "nothing is ranked" in text(analysis)
    assert "Several seeds on these examples could detect" in text(analysis)
    # Such words are there with two seeds, so that the search above can fail.
    assert RANKING.search(text(analyze(compared(noisy(shifts, seeds=(3, 4))))))


def test_heading_and_design():
    analysis = analyze(compared(noisy(SHIFTS)), resamples=500)
    assert analysis.heading == "comparison over 3 seeds"
    assert (analysis.examples, analysis.clusters, analysis.seeds) == (60, 20, (0, 1, 2))
    assert (analysis.resamples, analysis.alpha, analysis.baseline) == (500, 0.05, "sft")
    assert [found.method for found in analysis.methods] == ["sft", "uld", "mined", "alm"]
    first = analysis.sentences()[0]
    assert first.startswith("F1 over 60 held-out examples in 20 clusters")
    detectable = sorted(found.difference.smallest_detectable for found in analysis.methods[1:])
    assert f"about {detectable[0]:.1f} to {detectable[-1]:.1f} points or more" in text(analysis)


def test_verdicts_come_with_what_other_seeds_would_do():
    analysis = analyze(compared(noisy(SHIFTS)), alpha=0.1)
    spreads = {
        name: one.difference.seed_interval
        for name, one in by_method(analysis).items()
        if one.difference is not None
    }
    [told] = [one for one in analysis.sentences() if one.startswith("Verdicts are about these")]
    ends = [f"{name} {low:+.1f} to {high:+.1f}" for name, (low, high) in spreads.items()]
    assert told.endswith(f"its interval over seeds tells, here at 90 %: {'; '.join(ends)}.")
    # One seed has no spread.
    alone = [one for one in noisy(SHIFTS) if one.method != "uld" or one.seed == 2]
    assert "uld -" not in text(analyze(compared(alone))) and "uld +" not in text(
        analyze(compared(alone))
    )


def test_claim_that_the_seeds_do_not_bear_out():
    base = np.full(60, 50.0)
    finals = [run("sft", seed, base) for seed in range(3)]
    finals += [run("uld", seed, base + gain) for seed, gain in enumerate((30.0, 1.0, -1.0))]
    # All clusters agree, the seeds do not.
    analysis = analyze(compared(finals))
    found = by_method(analysis)["uld"].difference
    assert found.verdict == "better" and found.is_borne_out is False
    assert found.seed_interval.low < 0 < found.seed_interval.high
    assert "uld is better as far as the examples go, but its interval over 3 seeds (-" in text(
        analysis
    )
    assert "includes 0: other seeds might not bear it out" in text(analysis)
    assert "cannot be estimated: no difference to sft varies between clusters" in text(analysis)


def test_seeds_that_agree_where_the_examples_do_not_decide():
    gains = np.where(np.arange(60) < 3, 30.0, 0.0)
    finals = [run("sft", seed, np.full(60, 50.0)) for seed in range(3)]
    finals += [run("uld", seed, 50 + gains * (1 + seed / 10)) for seed in range(3)]
    analysis = analyze(compared(finals))
    assert by_method(analysis)["uld"].difference.verdict == "undecided"
    assert "the seeds agree, the examples are too few" in text(analysis)


def test_seeds_that_one_method_lacks_are_left_out_and_named():
    finals = noisy(SHIFTS)
    kept = [one for one in finals if (one.method, one.seed) != ("uld", 1)]
    analysis = analyze(compared(kept))
    found = by_method(analysis)["uld"]
    assert found.seeds == found.difference.seeds == (0, 2)
    whole = by_method(analyze(compared(finals)))["uld"].difference
    assert found.difference.seed_means == (whole.seed_means[0], whole.seed_means[2])
    assert "uld and sft share seeds 0 and 2 only; seed 1, which one of them lacks, is left" in text(
        analysis
    )


def test_method_with_one_shared_seed_is_not_tested():
    finals = [one for one in noisy(SHIFTS) if one.method != "uld" or one.seed == 2]
    analysis = analyze(compared(finals))
    found = by_method(analysis)["uld"].difference
    assert (found.verdict, found.p_value, found.seed_interval) == ("not tested", None, None)
    assert analysis.comparisons == 2
    assert "uld is not tested: that takes two seeds shared with sft." in text(analysis)
    assert "uld is better" not in text(analysis)


@pytest.mark.parametrize("clusters", [1, 3])
def test_too_few_clusters(clusters):
    groups = tuple(f"story {place % clusters}" for place in range(60))
    analysis = analyze(compared(noisy({"sft": 0.0, "uld": 40.0}, groups=groups)))
    found = by_method(analysis)["uld"].difference
    assert found.verdict == ("not tested" if clusters == 1 else "undecided")
    assert found.smallest_detectable is found.interval is found.adjusted_interval is None
    assert "no difference of any size could be told from 0" in text(analysis)
    assert f"{clusters} cluster{'s' * (clusters > 1)}," in text(analysis)


def test_result_of_a_method_by_hand():
    more = [
        {"steps": 9, "seconds": 10.0, "seconds_per_step": 1.0, "peak_memory": 5},
        {"steps": 9, "seconds": 20.0, "seconds_per_step": 3.0, "peak_memory": 8},
        {"steps": 9, "seconds": 60.0, "seconds_per_step": 1.5, "peak_memory": None},
    ]
    losses = [{"ce": 1.0, "kd": 4.0}, {"ce": 2.0, "kd": 5.0}, {"ce": 6.0}]
    finals = [
        run("sft", seed, [10.0 * (seed + 1)] * 60, losses=losses[seed], **more[seed])
        for seed in (2, 0, 1)
    ]
    found = analyze(compared(finals)).methods[0]
    assert (found.mean, found.seeds, found.seed_means) == (20.0, (0, 1, 2), (10.0, 20.0, 30.0))
    assert found.means == {"f1": 20.0, "exact_match": 10.0, "rouge_lsum": 1.0}
    assert found.interval == (20.0, 20.0)
    assert found.seed_interval == pytest.approx(seed_interval([10.0, 20.0, 30.0]))
    assert found.losses == {"ce": 3.0}
    assert (found.steps, found.seconds) == (9, 30.0)
    assert (found.seconds_per_step, found.peak_memory) == (1.5, 8)


def test_references_have_no_seeds():
    scores = np.random.default_rng(0).uniform(0, 100, 60)
    references = [run(UNTRAINED, None, scores), run(TEACHER, None, [90.0] * 60)]
    untrained, teacher = analyze(compared(noisy(SHIFTS), references)).references
    assert (untrained.method, teacher.method, teacher.mean) == (UNTRAINED, TEACHER, 90.0)
    assert untrained.interval == pytest.approx(cluster_bootstrap(scores, GROUPS).interval())
    assert untrained.seeds == untrained.seed_means == ()
    assert untrained.seed_interval is untrained.peak_memory is untrained.seconds_per_step is None


def test_the_gap_to_the_teacher_is_that_of_the_seeds_that_both_have():
    # sft has 20 with seed 0 and 30 with seeds 1 and 2, the teacher 90.
    means = {"sft": (20.0, 30.0, 30.0), "uld": (None, 45.0, 60.0), "mined": (10.0, 30.0, 30.0)}
    finals = [
        run(name, seed, np.full(60, mean))
        for name, of_seeds in means.items()
        for seed, mean in enumerate(of_seeds)
        if mean is not None
    ]
    teacher = run(TEACHER, None, np.full(60, 90.0))
    found = by_method(analyze(compared(finals, [teacher]), resamples=200))
    assert found["uld"].difference.gap_share == pytest.approx(22.5 / 60)
    assert found["mined"].difference.gap_share == pytest.approx(-10 / 3 / (90 - 80 / 3))
    for references in ([], [run(TEACHER, None, np.full(60, 25.0))]):
        alone = by_method(analyze(compared(finals, references), resamples=200))
        assert alone["uld"].difference.gap_share is None


def test_metric_alpha_and_seed_are_used():
    finals = noisy(SHIFTS)
    f1, half = (
        by_method(analyze(compared(finals, metric=m)))["uld"] for m in ("f1", "exact_match")
    )
    assert half.mean == pytest.approx(f1.mean / 2)
    assert half.difference.mean == pytest.approx(f1.difference.mean / 2)
    strict = by_method(analyze(compared(finals), alpha=0.01))["uld"]
    assert strict.interval.low < f1.interval.low
    assert strict.difference.interval.low < f1.difference.interval.low
    assert strict.difference.smallest_detectable > f1.difference.smallest_detectable
    assert by_method(analyze(compared(finals), seed=1))["uld"].interval != f1.interval
    assert by_method(analyze(compared(finals)))["uld"] == f1


def test_analysis_can_be_written_as_json():
    for seeds in ((0,), (0, 1)):
        written = dataclasses.asdict(analyze(compared(noisy(SHIFTS, seeds=seeds))))
        assert json.loads(json.dumps(written, allow_nan=False))["baseline"] == "sft"


def test_baseline_alone():
    analysis = analyze(compared(noisy({"sft": 0.0})))
    assert len(analysis.sentences()) == 1


def changed(place, **fields):
    def change(record):
        found = list(record.answers)
        found[place] = dataclasses.replace(found[place], **fields)
        return dataclasses.replace(record, answers=tuple(found))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            changed(7, id="q99"),
            "'uld' seed 1 has example 'q99' of 'story 2' at place 7 where 'sft'",
        ),
        (changed(7, group="story 9"), "'q7' of 'story 9' at place 7 where 'sft' seed 0 has 'q7'"),
        (
            lambda one: dataclasses.replace(one, answers=one.answers[:-1]),
            "'uld' seed 1 has 59 answers where 'sft' seed 0 has 60",
        ),
        (
            lambda one: dataclasses.replace(one, answers=(*one.answers[1::-1], *one.answers[2:])),
            "'uld' seed 1 has example 'q1' of 'story 0' at place 0",
        ),
        (changed(7, scores={"exact_match": 1.0}), "an answer of 'uld' seed 1 has no score 'f1'"),
        (changed(7, scores={"f1": float("nan")}), "got nan"),
        (lambda one: dataclasses.replace(one, seed=None), "expected a seed for 'uld', got none"),
        (lambda one: dataclasses.replace(one, seed=2), "two runs of 'uld' seed 2"),
    ],
)
def test_records_that_cannot_be_compared(change, message):
    finals = [change(one) if (one.method, one.seed) == ("uld", 1) else one for one in noisy(SHIFTS)]
    with pytest.raises(DataError, match=re.escape(message)):
        analyze(compared(finals))


def test_other_comparisons_that_cannot_be_made():
    finals = noisy(SHIFTS)
    with pytest.raises(DataError, match="'sfd' has no runs; there are runs of sft, uld, mined"):
        analyze(compared(finals, baseline="sfd"))
    with pytest.raises(DataError, match="has no runs; there are runs of nothing"):
        analyze(compared([]))
    with pytest.raises(DataError, match="expected one of f1, exact_match, rouge_lsum"):
        analyze(compared(finals, metric="bleu"))
    with pytest.raises(DataError, match="'sft' seed 0 has no answers"):
        analyze(compared([run("sft", 0, [])]))
    with pytest.raises(DataError, match=f"'{TEACHER}' has 59 answers where 'sft' seed 0 has 60"):
        analyze(compared(finals, [run(TEACHER, None, [1.0] * 59)]))
    apart = noisy({"sft": 0.0}, seeds=(0, 1)) + noisy({"uld": 0.0}, seeds=(2, 3))
    with pytest.raises(DataError, match="'uld' has runs of seed 2 and 3, the baseline 'sft' of 0"):
        analyze(compared(apart))
    with pytest.raises(SettingError, match="alpha must lie between 0 and 1, got 5"):
        analyze(compared(finals), alpha=5)


def test_seeds_that_gave_one_student_are_told():
    runs = [
        dataclasses.replace(
            one, losses={"ce": 2.0 + 1e-9 * one.seed + (one.method == "uld") * place}
        )
        for place, one in enumerate(noisy({"sft": 0.0, "uld": 8.0}))
    ]
    (said,) = (one for one in analyze(compared(runs)).sentences() if "same student" in one)
    assert said.startswith("The seeds of sft gave one and the same student")


def test_of_bits_per_byte_less_is_better():
    def measured(record, sign):
        scores = [{"bits_per_byte": 2 + sign * one.scores["f1"] / 100} for one in record.answers]
        each = zip(record.answers, scores, strict=True)
        return dataclasses.replace(
            record, answers=tuple(dataclasses.replace(one, scores=found) for one, found in each)
        )

    runs = noisy({"sft": 0, "up": 12, "down": -12})
    for sign, better in ((1, "down"), (-1, "up")):
        found = analyze(
            compared([measured(one, sign) for one in runs], metric="bits_per_byte"), resamples=500
        )
        verdicts = {one.method: one.difference.verdict for one in found.methods if one.difference}
        assert sorted(verdicts.values()) == ["better", "worse"] and verdicts[better] == "better"
        assert any(f"{better} is better than sft" in one for one in found.sentences())
        assert any("bits per byte or more" in one for one in found.sentences())
