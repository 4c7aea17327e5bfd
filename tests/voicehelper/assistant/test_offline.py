"""The built-in provider."""

import asyncio
import time

from voicehelper.assistant.conf import AssistantSettings
from voicehelper.assistant.offline import Offline
from voicehelper.assistant.providers import Excerpt, Prompt, Turn, Usage, approximate_tokens, provider_of

EXCERPTS = [
    Excerpt("Kitchen", "Lunch is at noon. The kitchen closes at two."),
    Excerpt("Roadmap", "The roadmap is public.\nThe next release is on Friday! It is large."),
]


def ask(question, *, excerpts=(), model="offline-simple", word_seconds=0.0):
    """(chunks, usage)"""
    provider = Offline(AssistantSettings(offline_word_seconds=word_seconds))
    prompt = Prompt(model=model, instructions="Be brief.", turns=[Turn("user", question)], excerpts=excerpts)

    async def read():
        return [piece async for piece in provider.stream(prompt, headers={}, timeout_seconds=1)]

    *chunks, usage = asyncio.run(read())
    assert isinstance(usage, Usage)
    return chunks, usage


def test_it_is_chosen_without_an_address():
    assert isinstance(provider_of(AssistantSettings()), Offline)


def test_it_quotes_what_has_most_in_common_with_the_question():
    chunks, _ = ask("When is the next release?", excerpts=EXCERPTS)
    assert "".join(chunks) == "The next release is on Friday! (From 'Roadmap'.)"
    chunks, _ = ask("When is the next release, and lunch?", excerpts=EXCERPTS, model="offline-complex")
    text = "".join(chunks)
    assert text.startswith("The next release is on Friday! (From 'Roadmap'.) ")
    assert text.count("(From") == 3


def test_chinese():
    excerpts = [Excerpt("菜单", "午餐是中午。晚餐是七点。")]
    assert "".join(ask("晚餐几点\uff1f", excerpts=excerpts)[0]) == "晚餐是七点。 (From '菜单'.)"


def test_without_documents_it_says_so():
    text = "".join(ask("When?")[0])
    assert '"When?"' in text and "LLM_BASE_URL" in text
    assert "".join(ask("When?", excerpts=[Excerpt("Kitchen", "Nothing of the kind.")])[0]) == text
    assert "x" * 201 not in "".join(ask("x" * 32_000)[0])


def test_the_same_question_has_the_same_answer_word_by_word():
    chunks, usage = ask("When is the next release?", excerpts=EXCERPTS)
    assert len(chunks) == 8 and all(len(chunk.split()) == 1 for chunk in chunks)
    assert ask("When is the next release?", excerpts=EXCERPTS) == (chunks, usage)


def test_it_counts_tokens_by_the_documented_estimate():
    chunks, usage = ask("When?")
    assert usage.input_tokens == approximate_tokens("Be brief.") + approximate_tokens("When?") == 3 + 2
    assert usage.output_tokens == approximate_tokens("".join(chunks))
    assert [approximate_tokens(text) for text in ("", "a", "four", "fives", "四")] == [0, 1, 1, 2, 1]


def test_it_takes_its_time():
    started = time.perf_counter()
    chunks, _ = ask("When is the next release?", excerpts=EXCERPTS, word_seconds=0.01)
    assert time.perf_counter() - started >= 0.01 * len(chunks)
