"""openai (sync, async, streams; answers validated against its own schema), langchain-openai, llm."""
import asyncio
import json
import os
import pathlib
import subprocess
import sys

import openai

MODEL, BASE = os.environ["MODEL"], os.environ["URL"] + "/v1"
IS_CHAT = "smollm2" in MODEL
QUESTION = "What is the capital city of France? Answer in one sentence."
MESSAGES = [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": QUESTION}]
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 24}
client = openai.OpenAI(base_url=BASE, api_key="none", _strict_response_validation=True, max_retries=0)
# OpenAI's own schema forbids the null finish_reason of a completion stream's chunks and echo's first null score.
lenient = openai.OpenAI(base_url=BASE, api_key="none", max_retries=0)
later = openai.AsyncOpenAI(base_url=BASE, api_key="none", _strict_response_validation=True, max_retries=0)


def sense(text):
    """A chat model knows the answer; the small one, which only knows stories, writes words."""
    assert "Paris" in text if IS_CHAT else len(text.split()) >= 3, text


def test_models():
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"


def test_chat():
    answer = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    choice = answer.choices[0]
    sense(choice.message.content)
    assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 1 <= answer.usage.completion_tokens <= 24 and answer._request_id


def stream_text(chunks):
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_stream_says_what_chat_says():
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    chunks = list(client.chat.completions.create(messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY))
    assert stream_text(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and len({c.id for c in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert not chunks[-1].choices and chunks[-1].usage == whole.usage


def test_many_at_once_say_what_each_says_alone():
    asks = [dict(GREEDY, messages=[{"role": "user", "content": f"Tell me about the number {n}."}]) for n in range(12)]
    alone = [client.chat.completions.create(**ask).choices[0].message.content for ask in asks]

    async def streamed(ask):
        return stream_text([c async for c in await later.chat.completions.create(stream=True, **ask)])

    async def together():
        whole = [later.chat.completions.create(**ask) for ask in asks]
        return await asyncio.gather(*whole, *(streamed(ask) for ask in asks))

    answers = asyncio.run(together())
    assert [a.choices[0].message.content for a in answers[:12]] == alone
    assert answers[12:] == alone


def test_completions_of_several_prompts_and_choices():
    prompts = ["Once upon a time", "The little dog"]
    answer = client.completions.create(model=MODEL, prompt=prompts, n=2, max_tokens=8, seed=7, temperature=1)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    again = client.completions.create(model=MODEL, prompt=prompts[1], n=2, max_tokens=8, seed=7, temperature=1)
    assert [c.text for c in again.choices] == [c.text for c in answer.choices[2:]]
    assert len({c.text for c in answer.choices}) > 2  # seeds of choices differ


def test_echo_scores_the_prompt():
    answer = lenient.completions.create(model=MODEL, prompt="Once upon a time", echo=True, max_tokens=0, logprobs=2)
    scores = answer.choices[0].logprobs
    assert answer.choices[0].text == "Once upon a time" and answer.choices[0].finish_reason == "length"
    assert scores.token_logprobs[0] is None and all(p <= 0 for p in scores.token_logprobs[1:])
    assert scores.tokens[-3:] == [" upon", " a", " time"] and scores.text_offset[-3:] == [4, 9, 11]
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == len(scores.text_offset)


def test_chat_logprobs():
    answer = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY)
    items = answer.choices[0].logprobs.content
    written = items[:-1] if answer.choices[0].finish_reason == "stop" else items  # the end of the turn is scored, not written
    assert b"".join(bytes(i.bytes) for i in written).decode() == answer.choices[0].message.content
    assert all(i.top_logprobs[0].logprob >= i.logprob - 1e-6 and i.token == i.top_logprobs[0].token for i in items)  # greedy


def test_stop_string_ends_the_answer():
    plain = client.completions.create(prompt="Once upon a time", **GREEDY).choices[0].text
    word = plain.split()[3]
    cut = client.completions.create(prompt="Once upon a time", stop=[word], **GREEDY).choices[0]
    assert cut.finish_reason == "stop" and cut.text == plain[:plain.index(word)]


def test_errors_are_the_clients_own():
    for ask, error, param in [
        ({"temperature": "hot"}, openai.BadRequestError, "temperature"),
        ({"max_tokens": -5}, openai.BadRequestError, "max_tokens"),
        ({"model": "no-such-model"}, openai.NotFoundError, "model"),
    ]:
        try:
            client.chat.completions.create(**{**GREEDY, "messages": MESSAGES, **ask})
            raise AssertionError(f"{ask} was accepted")
        except error as e:
            assert e.param == param and e.request_id, (e.param, e.request_id)


def test_a_stream_left_early_leaves_the_server_well():
    with lenient.completions.create(model=MODEL, prompt="Once upon a time", stream=True, max_tokens=2000,
                                   extra_body={"ignore_eos": True}) as stream:
        for _, chunk in zip(range(3), stream):
            assert chunk.choices[0].text is not None
    assert client.completions.create(model=MODEL, prompt="Once", max_tokens=1).choices


def test_langchain():
    from langchain_openai import ChatOpenAI, OpenAI
    chat = ChatOpenAI(model=MODEL, base_url=BASE, api_key="none", temperature=0, max_tokens=24)
    answer = chat.invoke([("system", "You are helpful."), ("user", QUESTION)])
    sense(answer.content)
    assert answer.usage_metadata["output_tokens"] >= 1
    assert "".join(c.content for c in chat.stream([("system", "You are helpful."), ("user", QUESTION)])) == answer.content
    assert len(chat.batch([QUESTION, "Who are you?"])) == 2
    assert OpenAI(model=MODEL, base_url=BASE, api_key="none", temperature=0, max_tokens=8).invoke("Once upon a time")


def test_llm():
    home = pathlib.Path(os.environ["SCRATCH"], "llm")
    home.mkdir(exist_ok=True)
    (home / "extra-openai-models.yaml").write_text(
        f"- {{model_id: ours, model_name: {MODEL}, api_base: '{BASE}'}}\n"
        f"- {{model_id: ours-text, model_name: {MODEL}, api_base: '{BASE}', completion: true}}\n")
    llm = pathlib.Path(sys.executable).parent / "llm"

    def run(*arguments):
        done = subprocess.run([llm, *arguments], env={**os.environ, "LLM_USER_PATH": str(home)}, text=True,
                              capture_output=True, stdin=subprocess.DEVNULL, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    said = run("-m", "ours", "-s", "You are helpful.", "-o", "temperature", "0", "-o", "max_tokens", "24", QUESTION)
    sense(said)
    assert said == run("-m", "ours", "-s", "You are helpful.", "-o", "temperature", "0", "-o", "max_tokens", "24", "--no-stream", QUESTION)
    assert run("-m", "ours-text", "-o", "max_tokens", "8", "Once upon a time")
    assert json.loads(run("logs", "list", "-n", "1", "--json"))[0]["response"]
