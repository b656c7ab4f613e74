"""A text as tokens, and which of the tokens lie before a character of it."""

from bisect import bisect_right
from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from ila.boundary import in_one_line
from ila.data.rendering import common_prefix


class Pieces:
    """A text and its tokens, tokenised once.

    Attributes:
        text: The text.
        tokenizer: Its tokenizer; one that gives offsets saves time.
        ids: The tokens, without special ones around them.
    """

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase):
        self.text, self.tokenizer = text, tokenizer
        found = self._tokenised(text, return_offsets_mapping=getattr(tokenizer, "is_fast", False))
        self.ids = list(found["input_ids"])
        self.starts = [begin for begin, _ in found.get("offset_mapping", ())]
        self.ends = [end for _, end in found.get("offset_mapping", ())]
        # Else a bisection would go astray; no tokenizer is known to do this.
        self.is_ordered = self.ends == sorted(self.ends) and len(self.ends) == len(self.ids)

    def before(self, character: int) -> int:
        """Count the leading tokens that lie before a character.

        Where offsets do not say it, the text up to there is tokenised alone: the tokens that both
        have in common.
        """
        if character >= len(self.text):
            return len(self.ids)
        if character == 0:  # a first token may have no width
            return 0
        if self.is_ordered:
            count = bisect_right(self.ends, character)
            end = self.ends[count - 1] if count else 0
            begin = self.starts[count] if count < len(self.ids) else len(self.text)
            if begin < character or begin == end == character:
                return count
            end += self._trimmed(count - 1, at_end=True)
            begin -= self._trimmed(count, at_end=False)
            if begin == end:
                return count - 1 if end > character else count
        alone = list(self._tokenised(self.text[:character])["input_ids"])
        return common_prefix(alone, self.ids)

    def _trimmed(self, index: int, *, at_end: bool) -> int:
        """Count the white space of a token that some tokenizers leave out of its offsets."""
        said = self.tokenizer.decode([self.ids[index]]) if 0 <= index < len(self.ids) else ""
        if not at_end:
            return len(said) - len(said.lstrip())
        # Of nothing but white space they keep the place where it ends.
        return len(said) - len(said.rstrip()) if said.strip() else 0

    def _tokenised(self, text: str, **options: bool) -> Mapping[str, list]:
        try:
            # verbose=False: long rows are cut later, no need to warn about model_max_length.
            return self.tokenizer(text, add_special_tokens=False, verbose=False, **options)
        except Exception as error:
            lone = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if lone is not None:
                raise ValueError(
                    f"character {lone + 1} of its text is half of a surrogate pair "
                    f"({text[lone]!r}), which no text may hold"
                ) from error
            raise ValueError(f"the tokenizer refused its text: {in_one_line(error)}") from error
