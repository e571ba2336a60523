"""Metrics of answers, given the answers that count as right, and what a table writes of a metric.

Exact match and F1 follow SQuAD's evaluation, Rouge-LSum follows `rouge-score` with Porter stemming.
All three take the best of an example's references. The single-example functions return a fraction
between 0 and 1, `score` returns percent. No model is needed here: `read_predictions` and
`match_predictions` serve answers that were written to a file earlier, by ctkd or by anything else.
"""

import functools
import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ctkd.errors import DataError, OutputError

__all__ = [
    "ANSWER_METRICS",
    "BITS_PER_BYTE",
    "GIVEN_BITS",
    "METRICS",
    "Metric",
    "Prediction",
    "Referenced",
    "Scores",
    "exact_match",
    "f1",
    "match_predictions",
    "normalize_answer",
    "read_predictions",
    "rouge_lsum",
    "score",
    "write_predictions",
]

BITS_PER_BYTE = "bits_per_byte"
GIVEN_BITS = "given_bits_per_byte"
"""Name of the metric of given texts; `ctkd.distill.evaluation.bits` measures it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A metric, for tables, pictures and sentences.

    Attributes:
        title: Its name for a person.
        unit: Of a difference.
        digits: Behind the point.
        sign: 1 where more is better, -1 where less is.

    Example:
        >>> METRICS["bits_per_byte"].gain(2.5, 2.25)
        0.25
    """

    title: str
    unit: str = "points"
    digits: int = 1
    sign: int = 1

    @property
    def heading(self) -> str:
        """Its name, and which way is better unless more is."""
        return self.title if self.sign > 0 else f"{self.title} (less is better)"

    def gain(self, before: float, after: float) -> float:
        """How much better the second value is than the first."""
        return self.sign * (after - before)


ANSWER_METRICS = ("f1", "exact_match", "rouge_lsum")
METRICS = {
    "f1": Metric(title="F1"),
    "exact_match": Metric(title="exact match"),
    "rouge_lsum": Metric(title="Rouge-LSum"),
    BITS_PER_BYTE: Metric(title="bits per byte", unit="bits per byte", digits=4, sign=-1),
    # Of the answers that the data give, each after its prompt: all bits over all bytes.
    GIVEN_BITS: Metric(
        title="bits per byte of given answers", unit="bits per byte", digits=4, sign=-1
    ),
}
"""Metrics by name."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class Scores:
    """Metrics of a set of answers, all in percent.

    Attributes:
        exact_match: Mean exact match.
        f1: Mean bag-of-words F1.
        rouge_lsum: Mean Rouge-LSum F-measure.
        n: Number of examples.
        exact_match_each, f1_each, rouge_lsum_each: The same of each example, in the order given.
    """

    exact_match: float
    f1: float
    rouge_lsum: float
    n: int
    exact_match_each: tuple[float, ...]
    f1_each: tuple[float, ...]
    rouge_lsum_each: tuple[float, ...]

    def summary(self) -> dict[str, float]:
        """Return the three means and `n`, without the lists: what a table or a log shows."""
        return {name: getattr(self, name) for name in (*ANSWER_METRICS, "n")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One answer, as a line of a predictions file holds it.

    Attributes:
        prediction: The answer.
        id: What ties the answer to an example, where known.
        references: The answers that count as right; empty where the line names none.
        prompt: What the model was asked, where known.
    """

    prediction: str
    id: str | None = None
    references: tuple[str, ...] = ()
    prompt: str | None = None


class Referenced(Protocol):
    """An example that `match_predictions` can look up."""

    @property
    def id(self) -> str:
        """The id that a prediction of this example has."""

    @property
    def references(self) -> Sequence[str]:
        """The answers that count as right."""


def normalize_answer(text: str) -> str:
    """Reduce an answer to the words that SQuAD's evaluation compares.

    In this order: lower case; ASCII punctuation removed; the words "a", "an" and "the" removed;
    runs of white space become one space, none at the ends.

    Example:
        >>> normalize_answer("  The cat's  hat, an old one! ")
        'cats hat old one'
    """
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if the normalized answer equals a normalized reference, else 0.

    Args:
        prediction: The answer.
        references: The answers that count as right, at least one.

    Raises:
        DataError: If `references` is empty or a single string.

    Example:
        >>> exact_match("The Nile.", ["Amazon", "nile"])
        1.0
    """
    return _best(_exact_match_one, prediction, references)


def f1(prediction: str, references: Sequence[str]) -> float:
    """Return the bag-of-words F1 against the best reference.

    With P the share of the answer's normalized words that the reference holds too, and R the share
    of the reference's words that the answer holds, counting repeated words as often as both have
    them, F1 = 2PR / (P + R). Both without words: 1. Only one without words: 0. Words are what white
    space separates, so a script written without spaces is one word.

    Args:
        prediction: The answer.
        references: The answers that count as right, at least one.

    Raises:
        DataError: If `references` is empty or a single string.

    Example:
        Two of three words are right and the reference has two: P = 2/3, R = 1.

        >>> f1("the old blue house", ["blue house"])
        0.8
    """
    return _best(_f1_one, prediction, references)


def rouge_lsum(prediction: str, references: Sequence[str]) -> float:
    """Return the Rouge-LSum F-measure against the best reference.

    The longest common subsequence of each pair of lines, united per line of the reference, over
    stemmed words; for single lines it is Rouge-L. `rouge-score` keeps only the letters a-z and
    digits: "café" is read as "caf", and a reference or an answer wholly in another script has no
    words and scores 0, even against itself. Read exact match and F1 for such text. The rule is kept
    as it is, so that figures can be compared with published ones.

    Args:
        prediction: The answer; sentences are separated by newlines, if at all.
        references: The answers that count as right, at least one.

    Raises:
        DataError: If `references` is empty or a single string.

    Example:
        Stemming makes "walks" and "walking" one word.

        >>> rouge_lsum("she walks home", ["he runs", "she was walking home"])
        0.8571428571428571
    """
    scorer = _rouge_scorer()

    def one(answer: str, reference: str) -> float:
        return float(scorer.score(reference, answer)["rougeLsum"].fmeasure)

    return _best(one, prediction, references)


_METRICS = (exact_match, f1, rouge_lsum)


def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Score answers and average over examples.

    Args:
        predictions: One answer per example.
        references: For each example, the answers that count as right.

    Raises:
        DataError: If the two differ in length, nothing is there to score, or an example has no
            reference.

    Example:
        >>> scores = score(["Paris", "in 1888"], [["paris"], ["1889", "in the year 1888"]])
        >>> scores.exact_match, round(scores.f1, 2), scores.n
        (50.0, 90.0, 2)
    """
    if len(predictions) != len(references):
        raise DataError(
            f"expected as many predictions as sets of references, got {len(predictions)} and "
            f"{len(references)}; score the predictions against the examples they were made from"
        )
    if not predictions:
        raise DataError("expected at least one prediction to score, got none")
    rows = []
    for number, (answer, accepted) in enumerate(zip(predictions, references, strict=True), start=1):
        try:
            rows.append([100.0 * metric(answer, accepted) for metric in _METRICS])
        except DataError as error:
            raise DataError(f"example {number}: {error}") from None
    matches, overlaps, rouges = zip(*rows, strict=True)
    return Scores(
        exact_match=math.fsum(matches) / len(rows),
        f1=math.fsum(overlaps) / len(rows),
        rouge_lsum=math.fsum(rouges) / len(rows),
        n=len(rows),
        exact_match_each=matches,
        f1_each=overlaps,
        rouge_lsum_each=rouges,
    )


def write_predictions(path: str | Path, rows: Iterable[Prediction]) -> None:
    """Write answers as JSON lines with `id`, `prompt`, `prediction` and `references`.

    A field that a row lacks is left out. Missing folders are made; an existing file is replaced.

    Args:
        path: The file to write.
        rows: The answers.

    Raises:
        OutputError: If the file cannot be written.
    """
    target = Path(path)
    lines = []
    for row in rows:
        record = {
            "id": row.id,
            "prompt": row.prompt,
            "prediction": row.prediction,
            "references": list(row.references) or None,
        }
        held = {name: value for name, value in record.items() if value is not None}
        # Half a surrogate pair has no UTF-8 form; its backslash form is JSON's escape.
        lines.append(json.dumps(held, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"".join(lines))
    except OSError as error:
        raise OutputError(
            f"cannot write predictions to {target}: {error.strerror or error}; "
            "name a file in a folder you may write to"
        ) from error


def read_predictions(path: str | Path) -> list[Prediction]:
    """Read a file of answers, one JSON object a line.

    Each needs `prediction`, a string. `references`, a list of strings or one string, and `id`, a
    string or a whole number, are read where they are there; other fields are ignored, and so are
    blank lines.

    Args:
        path: The file, in UTF-8.

    Raises:
        DataError: If the file cannot be read, holds no prediction, or a line is not as above.
    """
    source = Path(path)
    try:
        content = source.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read predictions from {source}: {error.strerror or error}; "
            "name a file of JSON lines"
        ) from error
    rows = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            try:
                rows.append(_parse(line))
            except DataError as error:
                raise DataError(f"{source}, line {number}: {error}") from None
    if not rows:
        raise DataError(
            f'{source} holds no predictions; expected lines like {{"prediction": "...", '
            '"references": ["..."]}'
        )
    return rows


def match_predictions(
    predictions: Sequence[Prediction], examples: Sequence[Referenced]
) -> list[Prediction]:
    """Give each answer the references of the example with its id.

    References that a prediction brings along are replaced: the data decides.

    Args:
        predictions: Answers with ids, in any order.
        examples: The examples they answer, each with `id` and `references`.

    Returns:
        One prediction per example, in the order of `examples`.

    Raises:
        DataError: If a prediction has no id, an id occurs twice on either side, an example has no
            prediction, or a prediction's id is not among the examples.
    """
    for number, row in enumerate(predictions, start=1):
        if row.id is None:
            raise DataError(
                f"prediction {number} has no id; give every prediction the id of its example, "
                'or its own "references"'
            )
    ids = [str(row.id) for row in predictions]
    expected = [str(example.id) for example in examples]
    _refuse(_repeated(expected), "the data holds {} more than once; make its ids unique")
    _refuse(_repeated(ids), "{} predicted more than once; keep one prediction per id")
    by_id = dict(zip(ids, predictions, strict=True))
    known = set(expected)
    _refuse([i for i in ids if i not in known], "predicted but not in the data: {}; check the data")
    _refuse(
        [i for i in expected if i not in by_id],
        "no prediction for {}; predict every example, or limit the data to those predicted",
    )
    matched = zip((by_id[identity] for identity in expected), examples, strict=True)
    return [replace(row, references=tuple(example.references)) for row, example in matched]


def _best(metric: Callable[[str, str], float], prediction: str, references: Sequence[str]) -> float:
    if isinstance(references, str):
        raise DataError("expected a list of references, got one string; put it in a list")
    if not references:
        raise DataError("expected at least one reference, got none; add one or drop the example")
    return max(metric(prediction, reference) for reference in references)


def _exact_match_one(prediction: str, reference: str) -> float:
    return float(normalize_answer(prediction) == normalize_answer(reference))


def _f1_one(prediction: str, reference: str) -> float:
    predicted = Counter(normalize_answer(prediction).split())
    wanted = Counter(normalize_answer(reference).split())
    if not predicted and not wanted:
        return 1.0
    shared = (predicted & wanted).total()
    return 2 * shared / (predicted.total() + wanted.total())


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeLsum"], use_stemmer=True)


def _parse(line: bytes) -> Prediction:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise DataError(f"not JSON in UTF-8 ({reason}); expected one JSON object a line") from None
    if not isinstance(record, dict):
        raise DataError(f"expected a JSON object, got {type(record).__name__}")
    prediction = record.get("prediction")
    if not isinstance(prediction, str):
        raise DataError(
            f'expected "prediction" to be a string, got {type(prediction).__name__}; '
            f"the line has {', '.join(map(str, record)) or 'no fields'}"
        )
    references = record.get("references")
    if isinstance(references, str):
        references = [references]
    if "references" in record and not (
        isinstance(references, list) and references and all(isinstance(i, str) for i in references)
    ):
        raise DataError('expected "references" to be a list of one or more strings')
    identity = record.get("id")
    if isinstance(identity, bool) or not isinstance(identity, str | int | None):
        raise DataError(f'expected "id" to be a string or a whole number, got {identity!r}')
    prompt = record.get("prompt")
    return Prediction(
        prediction=prediction,
        id=None if identity is None else str(identity),
        references=tuple(references or ()),
        prompt=prompt if isinstance(prompt, str) else None,
    )


def _repeated(ids: Sequence[str]) -> list[str]:
    return [identity for identity, times in Counter(ids).items() if times > 1]


def _refuse(ids: Sequence[str], message: str) -> None:
    if ids:
        more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
        raise DataError(message.format(", ".join(map(repr, ids[:5])) + more))
