"""Tokenizers for the tests of data: byte-level, small, and with the chat templates people use."""

from collections.abc import Callable
from functools import cache

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ila.data import encode
from ila.data.row_encoder import IGNORED

SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["How many seats are there in the hall? There are 12 seats.", "Dear Ada, thank you."]

# The form of Qwen: tools in the system turn, calls as JSON, results in a user's turn.
CHATML = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson + '\n' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name + ' ' }}"
    "{{ c.function.arguments | tojson + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The form of DeepSeek: arguments are text, and are added to text.
ADDS_TEXT = CHATML.replace("c.function.arguments | tojson", "c.function.arguments")
# Strict about who speaks after whom, as Mistral is; the system turn is part of the first.
STRICT = (
    "{% set ns = namespace(last='', called=false) %}{% for m in messages %}"
    "{% if m.role == 'tool' and not ns.called %}{{ raise_exception('a result of no call') }}"
    "{% endif %}{% if ns.called and m.role != 'tool' and ns.last != 'tool' %}"
    "{{ raise_exception('a call without result') }}{% endif %}"
    "{% if m.role == ns.last %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'assistant' %}{{ ' ' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '[CALL]' + c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
    "{{ eos_token }}{% else %}{{ '[' + m.role + ']' + m.content + '[/]' }}{% endif %}"
    "{% if m.role != 'tool' %}{% set ns.called = (m.tool_calls or []) | length > 0 %}{% endif %}"
    "{% set ns.last = m.role %}{% endfor %}"
)
PLAIN_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "adds_text": ADDS_TEXT,
    "strict": STRICT,
    "plain_chatml": PLAIN_CHATML,
    "none": None,
}


@cache
def _build(template: str | None = None, *, trims: bool = False) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    if trims:
        core.post_processor = processors.ByteLevel(trim_offsets=True)
    template = TEMPLATES.get(template, template)
    eos = "<|im_end|>" if template and "im_end" in template else "</s>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, pad_token="<pad>"
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def build() -> Callable[..., PreTrainedTokenizerFast]:
    """Return the maker of tokenizers: by the name of a template, or a template itself."""
    return _build


@pytest.fixture(scope="session")
def trained_on() -> Callable[..., list[str]]:
    """Return a function that encodes one row and gives the stretches that carry loss, as text."""

    def stretches(row: dict, tokenizer: PreTrainedTokenizerFast, **options: int) -> list[str]:
        (encoded,), _ = encode([row], tokenizer, progress=False, **options)
        found, run = [], []
        for token, label in [*zip(*encoded.values(), strict=True), (0, IGNORED)]:
            if label != IGNORED:
                assert label == token
                run.append(token)
            elif run:
                found.append(tokenizer.decode(run))
                run = []
        return found

    return stretches
