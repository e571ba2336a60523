"""Answers that a teacher writes to prompts, kept in a file as they come."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctkd.distill.models.generation import Generated, generate
from ctkd.errors import OutputError

__all__ = ["TeacherTexts"]

_GROUP = 32


class TeacherTexts:
    """Greedy answers of one model by prompt, in a file of JSON lines that only grows.

    Which model wrote them is for the caller to keep apart: one file, one model.

    Args:
        path: The file; it need not exist yet.
        max_new_tokens: The longest answer. Answers of other lengths in the file are not used.
        one_line: Whether an answer ends at its first line break; the same holds for it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     texts = TeacherTexts(Path(folder, "texts.jsonl"), max_new_tokens=8)
        ...     texts.text([1, 2]), len(texts)
        (None, 0)
    """

    def __init__(self, path: Path, *, max_new_tokens: int, one_line: bool = True) -> None:
        self.path = path
        self.max_new_tokens = max_new_tokens
        self.one_line = one_line
        self._texts: dict[str, Generated] = {}
        if not path.exists():
            return
        for line in path.read_bytes().split(b"\n"):
            try:
                entry = json.loads(line)
                key, generated = entry["prompt"], Generated(entry["text"], entry["ended"])
                # A number has the same letters as a text.
                is_text = isinstance(generated.text, str) and isinstance(generated.ended, bool)
                is_whole = is_text and entry["check"] == _check(key, generated)
            except (ValueError, KeyError, TypeError, RecursionError):
                # A kill cut it short; what is missing is written again.
                continue
            if is_whole:
                self._texts[key] = generated

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, prompt_ids: Sequence[int]) -> str | None:
        """The answer to a prompt, without white space at its ends; None if there is none yet."""
        generated = self._texts.get(self._key(prompt_ids))
        return None if generated is None else generated.text

    def ended(self, prompt_ids: Sequence[int]) -> bool:
        """True if the model ended the answer itself; else it was cut after the most tokens."""
        generated = self._texts.get(self._key(prompt_ids))
        return generated is not None and generated.ended

    def missing(self, prompts: Sequence[Sequence[int]]) -> int:
        """The number of prompts that have no answer yet."""
        return sum(self.text(prompt) is None for prompt in prompts)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
        *,
        ends: Collection[int] = (),
        progress: str = "teacher: answering",
    ) -> None:
        """Let the model answer the prompts that have no answer yet.

        Prompts are answered in groups that depend on all of them alone, so that an answer does not
        depend on where an earlier call was stopped.

        Args:
            prompts: Token ids of each.
            load: Gives the model and its tokenizer; called only if something is missing.
            ends: As in `generate`.
            progress: Text of the bar.

        Raises:
            OutputError: If the file cannot be written.
        """
        # Equal prompts have one answer; longest first, as memory is needed most then.
        distinct = {self._key(prompt): prompt for prompt in prompts}
        order = sorted(distinct, key=lambda key: (-len(distinct[key]), key))
        groups = [order[start : start + _GROUP] for start in range(0, len(order), _GROUP)]
        if all(key in self._texts for key in order):
            return
        model, tokenizer = load()
        with tqdm(total=len(order), desc=progress, unit="prompt", disable=None) as bar:
            for group in groups:
                if not all(key in self._texts for key in group):
                    answers = generate(
                        model,
                        tokenizer,
                        [distinct[key] for key in group],
                        max_new_tokens=self.max_new_tokens,
                        stop_at_newline=self.one_line,
                        ends=ends,
                    )
                    self._append(dict(zip(group, answers, strict=True)))
                bar.update(len(group))

    def _append(self, texts: dict[str, Generated]) -> None:
        lines = "".join(
            json.dumps(
                {
                    "prompt": key,
                    "text": generated.text,
                    "ended": generated.ended,
                    "check": _check(key, generated),
                },
                ensure_ascii=False,
            )
            + "\n"
            for key, generated in texts.items()
        )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                # What a kill cut short must not swallow the next line.
                before = b"\n" if file.tell() and not self._ends_with_newline() else b""
                file.write(before + lines.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.path}: {error.strerror or error}; make room, or choose "
                "another folder"
            ) from error
        self._texts.update(texts)

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"

    def _key(self, prompt_ids: Sequence[int]) -> str:
        rule = self.max_new_tokens if self.one_line else f"{self.max_new_tokens} lines"
        text = f"{rule} {list(prompt_ids)}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _check(key: str, generated: Generated) -> str:
    """Tells a line that is as it was written."""
    return hashlib.sha256(f"{key} {generated.ended} {generated.text}".encode()).hexdigest()[:16]
