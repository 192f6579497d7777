"""Perplexity of the original, after a transform, and after recovery, on the same text."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantkit.checkpoint import Hub, Source
from quantkit.errors import DataError
from quantkit.evaluation import check_text, evaluate
from quantkit.journal import read_whole, write_whole
from quantkit.pairing import tokenizer_for
from quantkit.recovery.trained import report_before
from quantkit.texts import Texts


class Perplexities:
    """Measures perplexity before and after, on the same text; whether it can be is found out at once.

    Raises:
        DataError: it can't be, or the text is the one to train on.
    """

    def __init__(
        self,
        source: Source,
        original: str | Path | None,
        held: Texts,
        trained_on: Texts,
        hub: Hub,
        words: dict[str, Any],
    ) -> None:
        self.source, self.original, self.held, self.hub, self.words = source, original, held, hub, words
        if held.fingerprint == trained_on.fingerprint:
            raise DataError(f"{held.name} is the text to train on: evaluate on another split or file")
        tokenizer = None if held.kind == "tokens" else tokenizer_for(source.folder, original, hub, held)
        check_text(held, tokenizer, source.skeleton, source.name, words["seq_len"], words["max_tokens"])

    def before(self, folder: Path) -> dict[str, Any]:
        """The perplexities of the original and of what the transform made, kept in the folder once they are known."""
        path = folder / "perplexity.json"
        known = {"text": self.held.fingerprint, **{key: self.words[key] for key in ("seq_len", "max_tokens")}}
        with suppress(OSError, ValueError):
            kept = read_whole(path)
            if kept["of"] == known:
                return dict(kept["found"])
        made = self._measured(self.source.folder)
        found = {key: made[key] for key in ("dataset", "protocol", "tokens")} | _named(made, "transformed")
        if self.original is not None:
            found |= _named(self._measured(self.original), "original")
        else:
            found |= self._recorded(found)
        write_whole(path, {"of": known, "found": found})
        return found

    def after(self, folder: Path, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """All perplexities, now that there is a result."""
        return {**(before or {}), **_named(self._measured(folder), "recovered")}

    def _measured(self, model: str | Path | None) -> dict[str, Any]:
        assert model is not None
        words = {**self.words, "token": self.hub.token, "cache_dir": self.hub.cache_dir}
        trusted = self.hub.trust_remote_code
        return evaluate(model, self.held, trust_remote_code=trusted, **words)

    def _recorded(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """The original's perplexity as the source's own report has it, if it was measured on the same tokens."""
        said = report_before(self.source).get("evaluation") or {}
        if any(said.get(key) != found[key] for key in ("dataset", "protocol", "tokens")):
            return {}
        return {"original": said["baseline_perplexity"], "original_stderr": said["baseline_perplexity_stderr"]}


def _named(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name: result["perplexity"], f"{name}_stderr": result["perplexity_stderr"]}
