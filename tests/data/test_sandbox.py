"""Chat templates that would never end, or fill the memory."""

import threading
import time

import pytest

from distill.data import chat, sandbox, template
from models.errors import UserError
from tests.support.paths import TOKENIZER

_LOOP = "{% for a in range(99999) %}"
HOSTILE = {
    "a loop in a loop": _LOOP + _LOOP + "{% endfor %}{% endfor %}",
    "a loop that writes": _LOOP + _LOOP + "abcdefgh{% endfor %}{% endfor %}",
    "calls that double": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}"
    "{% endmacro %}"
    "{{ f(60) }}",
    "a sum that doubles": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "a concatenation that doubles": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a list that doubles": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "a power": "{{ 9**(9**9) }}",
    "a long list": "{{ [0] * 10**10 }}",
    "a long text": "{{ 'ab' * 10**10 }}",
    "a filter that pads": "{{ 'a' | center(10**10) }}",
    "a method that pads": "{{ 'a'.ljust(10**10) }}",
    "a format that pads": "{{ '%9999999999d' % 1 }}{{ '{:9999999999}'.format(1) }}",
    "a filter that formats": "{{ '%9999999999d' | format(1) }}",
    "a long range": "{{ range(10**10) | list }}",
    "a sample text": "{{ lipsum(n=100000) }}",
    "the classes of Python": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "a long template": "a" * 2_000_000,
}


@pytest.fixture(autouse=True)
def short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)


@pytest.fixture(scope="module")
def tokenizer():
    return chat.load_tokenizer(TOKENIZER)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_refused(name: str, tokenizer) -> None:
    tokenizer.chat_template, start = HOSTILE[name], time.monotonic()
    with pytest.raises(UserError, match=r"the chat template of .* cannot render the messages: "):
        template.render_text(tokenizer, [{"role": "user", "content": "2+2?"}])
    assert time.monotonic() - start < 5


def test_threads_other_than_the_main_one_are_bounded(tokenizer) -> None:
    tokenizer.chat_template = HOSTILE["a loop in a loop"]
    found: list[str] = []

    def render() -> None:
        try:
            template.render_text(tokenizer, [{"role": "user", "content": "2+2?"}])
        except UserError as error:
            found.append(str(error))

    thread = threading.Thread(target=render, daemon=True)
    thread.start()
    thread.join(10)
    assert found and found[0].endswith(f"it takes longer than {sandbox.SECONDS:g} s")


def test_concatenations_and_loops_render_as_before(tokenizer) -> None:
    tokenizer.chat_template = (
        "{%- for m in messages if m.role == 'user' %}{{ loop.index ~ ': ' ~ m.content }}"
        "{{ '%s!' % 3 * 2 }}{{ [1] + [2] }}{{ 2**3 }}{%- else %}none{%- endfor %}"
    )
    text = template.render_text(tokenizer, [{"role": "user", "content": "2+2?"}])
    assert text == "1: 2+2?3!3![1, 2]8"
