"""The API, used by the openai client: what it answers is what the model draws; bad requests have clear answers."""

import http.client
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CASES, LETTERS, TOKENIZER, make_served, running
from helpers import ScriptProcess, run_script

from nanoforge.errors import UserError
from nanoforge.models.generation import Decoder, SamplingParams, generate_batch, uniform_draws
from nanoforge.posttraining.examples import ExampleEncoder
from nanoforge.rng import SAMPLE
from nanoforge.serving.requests import Defaults
from nanoforge.serving.server import ModelServer, ServerOptions, listen

PROMPT = "to be or not"
ON = {"ignore_eos": True}
ENDLESS = {"max_tokens": 100_000, "ignore_eos": True}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]


def expected_text(server: ModelServer, ids: list[int], n_tokens: int, seed: int = 0, **sampling: Any) -> str:
    """What generate_batch draws, without the token that ends it."""
    params = SamplingParams(
        max_new_tokens=n_tokens, end_ids=TOKENIZER.end_ids, vocab_size=TOKENIZER.vocab_size, **sampling
    )
    (completion,) = generate_batch(server.engine.models["tiny"].model, [ids], params, uniform_draws(seed, SAMPLE))
    return TOKENIZER.decode(completion.ids[:-1] if completion.ended else completion.ids)


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text).tolist()


@torch.no_grad()
def logprobs_of(server: ModelServer, ids: list[int]) -> torch.Tensor:
    """(T - 1, V): of the token behind each but the last."""
    return server.engine.models["tiny"].model(torch.tensor([ids]))[0, :-1].log_softmax(-1)


def send(server: ModelServer, body: bytes, headers: dict[str, str] | None = None, path: str = "/v1/completions") -> Any:
    """(status, answer) of a POST."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        connection.request("POST", path, body, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, json.load(response)


def complete(client: Any, **options: Any) -> Any:
    return client.completions.create(**{"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "seed": 1, **options})


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_idle(server: ModelServer) -> bool:
    return all(not (model["running"] or model["waiting"]) for model in server.engine.state().values())


# ---------------------------------------------------------------------------------------------------------------------
# answers


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "other", "pair"]
    assert client.models.retrieve("other").meta["chat"] is True
    assert client.models.retrieve("pair").meta["contexts"] == ["letters", "cases"]


def test_a_completion_is_what_generate_batch_draws(server: ModelServer, client: Any) -> None:
    reply = complete(client, temperature=0, max_tokens=30)
    assert reply.choices[0].text == expected_text(server, ids_of(PROMPT), 30, temperature=0)
    assert reply.object == "text_completion" and reply.model == "tiny"
    sampling = {"temperature": 1.3, "top_p": 0.9, "extra_body": {"top_k": 11, "min_p": 0.02, "repetition_penalty": 1.2}}
    drawn = complete(client, seed=5, max_tokens=30, **sampling).choices[0].text
    options = {"temperature": 1.3, "top_p": 0.9, "top_k": 11, "min_p": 0.02, "repetition_penalty": 1.2}
    assert drawn == expected_text(server, ids_of(PROMPT), 30, seed=5, **options)
    assert (
        complete(client, prompt=ids_of(PROMPT), temperature=0, max_tokens=30).choices[0].text == reply.choices[0].text
    )


def test_a_chat_is_what_generate_batch_draws(server: ModelServer, client: Any) -> None:
    prompt = ExampleEncoder(TOKENIZER, 256).encode_prompt({"prompt": CHAT})
    reply = client.chat.completions.create(model="tiny", messages=CHAT, temperature=0, max_completion_tokens=25)
    assert reply.choices[0].message.content == expected_text(server, prompt, 25, temperature=0)
    assert reply.choices[0].message.role == "assistant"
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens - reply.usage.completion_tokens) == (len(prompt),) * 2
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]}]
    assert client.chat.completions.create(
        model="tiny", messages=[CHAT[0], *parts], temperature=0, max_tokens=25
    ).choices[0].message.content == (reply.choices[0].message.content)


def test_alone_is_among_others(client: Any) -> None:
    """A request with a seed draws the same, whoever shares the batch, and joins or leaves it meanwhile."""
    asked = [{"seed": seed, "max_tokens": 10 + 7 * seed, "temperature": 0.5 + 0.1 * seed} for seed in range(8)]
    alone = [complete(client, **options).choices[0].text for options in asked]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda options: complete(client, **options).choices[0].text, asked))
    assert together == alone
    assert len(set(alone)) == 8


def test_n_choices_and_several_prompts(client: Any) -> None:
    reply = complete(client, prompt=["ab", "cd"], n=3, seed=2, extra_body=ON)
    assert [choice.index for choice in reply.choices] == list(range(6))
    texts = [choice.text for choice in reply.choices]
    assert len(set(texts)) == 6 and complete(client, prompt="ab", seed=2).choices[0].text == texts[0]
    assert reply.usage.prompt_tokens == 4 and reply.usage.completion_tokens == 6 * 12


def test_streams_are_the_whole_in_parts(client: Any) -> None:
    options = {"seed": 3, "max_tokens": 40, "temperature": 1.0, "extra_body": ON}
    whole = complete(client, n=2, **options)
    chunks = list(complete(client, n=2, stream=True, stream_options={"include_usage": True}, **options))
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.text for choice in choices) == whole.choices[index].text
        assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
        assert len(choices) > 20
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert len({chunk.id for chunk in chunks}) == 1

    asked = {"model": "tiny", "messages": CHAT, **options}
    whole_chat = client.chat.completions.create(**asked).choices[0].message.content
    chunks = list(client.chat.completions.create(stream=True, **asked))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole_chat
    assert all(chunk.usage is None for chunk in chunks)


def test_streams_end_with_done(server: ModelServer) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 2, "stream": True})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert response.read().endswith(b"data: [DONE]\n\n")


def test_log_probabilities_are_the_models(server: ModelServer, client: Any) -> None:
    prompt = ids_of(PROMPT)
    for sampling in ({"temperature": 0}, {"temperature": 1.5, "seed": 1, "top_p": 0.8}):
        choice = complete(client, logprobs=3, **sampling).choices[0]
        names = TOKENIZER.control_tokens
        drawn = [names[token] if token in names else ids_of(token)[0] for token in choice.logprobs.tokens]
        expected = logprobs_of(server, [*prompt, *drawn])[len(prompt) - 1 :]
        got = torch.tensor(choice.logprobs.token_logprobs)
        torch.testing.assert_close(got, expected[range(len(drawn)), drawn], atol=1e-4, rtol=1e-4)
        for row, top in zip(expected, choice.logprobs.top_logprobs, strict=True):
            best = sorted(top.values(), reverse=True)[:3]
            torch.testing.assert_close(torch.tensor(best), row.topk(3).values, atol=1e-4, rtol=1e-4)
        lengths = [len(token) for token in choice.logprobs.tokens]
        assert choice.logprobs.text_offset == [sum(lengths[:at]) for at in range(len(drawn))]
    reply = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=9, logprobs=True, top_logprobs=2, temperature=0
    )
    content = reply.choices[0].logprobs.content
    assert "".join(token.token for token in content) == reply.choices[0].message.content
    assert all(token.top_logprobs[0].token == token.token for token in content)
    assert bytes(content[0].bytes).decode() == content[0].token


def test_echo_scores_the_prompt(server: ModelServer, client: Any) -> None:
    """As lm-eval asks for it."""
    text = "a longer text to score, " * 10
    choice = complete(client, prompt=ids_of(text), echo=True, max_tokens=1, logprobs=1, temperature=0).choices[0]
    expected = logprobs_of(server, ids_of(text))
    got = torch.tensor(choice.logprobs.token_logprobs[1:-1])
    torch.testing.assert_close(got, expected[range(len(expected)), ids_of(text)[1:]], atol=1e-4, rtol=1e-4)
    assert choice.logprobs.token_logprobs[0] is None and choice.text[:-1] == text
    scored = complete(client, prompt=text, echo=True, max_tokens=0, logprobs=1)
    assert scored.choices[0].text == text and scored.usage.completion_tokens == 0
    assert complete(client, echo=True, max_tokens=2).choices[0].text.startswith(PROMPT)


def test_stop_strings_end_the_text_before_them(client: Any) -> None:
    text = complete(client, max_tokens=60, seed=4, extra_body=ON).choices[0].text
    stop = text[20:23]
    cut = text[: text.index(stop)]
    reply = complete(client, max_tokens=60, seed=4, extra_body=ON, stop=[stop, "unlikely"])
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (cut, "stop")
    chunks = list(complete(client, max_tokens=60, seed=4, extra_body=ON, stop=stop, stream=True, logprobs=0))
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut
    assert "".join(token for chunk in chunks for token in chunk.choices[0].logprobs.tokens) == cut


def test_contexts_are_drawn_together(server: ModelServer, client: Any) -> None:
    prompt = {"letters": "abc", "cases": "UL."}
    reply = client.completions.create(
        model="pair",
        prompt="",
        max_tokens=9,
        seed=6,
        logprobs=5,
        temperature=1,
        extra_body={"prompt": prompt, "top_k": 0},
    )
    ids = [LETTERS.encode("abc").tolist(), (CASES.encode("UL.") + LETTERS.vocab_size).tolist()]
    params = SamplingParams(max_new_tokens=9)
    (completion,) = generate_batch(server.engine.models["pair"].model, [ids], params, uniform_draws(6, SAMPLE))
    letters, cases = zip(*completion.ids, strict=True)
    contexts = reply.choices[0].contexts
    assert contexts["letters"]["text"] == reply.choices[0].text == LETTERS.decode(letters)
    assert contexts["cases"]["text"] == CASES.decode([token - LETTERS.vocab_size for token in cases])
    assert len(contexts["cases"]["logprobs"]["tokens"]) == 9
    assert all(top.keys() == set("UL.") for top in contexts["cases"]["logprobs"]["top_logprobs"])  # 3 of 5, there are 3


# ---------------------------------------------------------------------------------------------------------------------
# bad requests: a clear answer, and the next request works

BAD = [
    ({"model": "nobody"}, 404, "model"),
    ({"model": "tino"}, 404, "model"),
    ({"temperature": float("nan")}, 400, "temperature"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"temperature": True}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_p": 1e999}, 400, "top_p"),
    ({"top_k": 1.5}, 400, "top_k"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 10**9}, 400, "max_tokens"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty"),
    ({"n": 129}, 400, "n"),
    ({"n": 100, "prompt": ["a", "b"]}, 400, "n"),
    ({"seed": -1}, 400, "seed"),
    ({"stop": ""}, 400, "stop"),
    ({"stop": ["a"] * 17}, 400, "stop"),
    ({"logprobs": 21}, 400, "logprobs"),
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [5, "a"]}, 400, "prompt"),
    ({"prompt": [99999]}, 400, "prompt"),
    ({"prompt": "caf\u00e9"}, 400, "prompt"),
    ({"prompt": "\ud800"}, 400, "prompt"),
    ({"prompt": "a" * 300}, 400, "prompt"),
    ({"prompt": {"letters": "a"}}, 400, "prompt"),
    ({"model": "pair", "prompt": {"letters": "ab", "cases": "U"}}, 400, "prompt"),
    ({"model": "pair", "prompt": {"letters": "ab"}}, 400, "prompt"),
    ({"model": "pair", "prompt": "a", "stop": "b"}, 400, "stop"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
    ({"temprature": 1}, 400, "temprature"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}, 400, "tools"),
    (
        {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_schema"}},
        400,
        "response_format",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0]"),
    ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, 400, "top_logprobs"),
    ({"messages": [{"role": "user", "content": "a"}], "model": "pair"}, 400, "model"),
    ({"messages": [{"role": "user", "content": "a" * 300}]}, 400, "messages"),
]


@pytest.mark.parametrize("change, status, param", BAD, ids=lambda value: str(value)[:40])
def test_bad_fields_are_named(server: ModelServer, change: dict[str, Any], status: int, param: str) -> None:
    path = "/v1/completions"
    body = {"model": "tiny", "prompt": "a", **change}
    if "messages" in change:
        path = "/v1/chat/completions"
        del body["prompt"]
    got, answer = send(server, json.dumps(body).encode(), path=path)
    assert (got, answer["error"]["param"]) == (status, param), answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert param in answer["error"]["message"] or "prompt has" in answer["error"]["message"]


def test_what_asks_for_nothing_is_no_error(client: Any) -> None:
    neutral = {"presence_penalty": 0, "logit_bias": {}, "user": "me", "best_of": 1, "suffix": None}
    assert complete(client, **neutral).choices[0].text
    chat = {"tools": [], "response_format": {"type": "text"}, "store": False, "metadata": {"a": "b"}}
    assert client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=3, **chat).choices


def test_the_client_raises_its_own_errors(client: Any) -> None:
    import openai

    with pytest.raises(openai.NotFoundError) as error:
        complete(client, model="nobody")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        complete(client, temperature=-1)
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, prompt="a" * 300)
    assert error.value.code == "context_length_exceeded"
    assert complete(client, prompt="a" * 300, extra_body={"truncate_prompt_tokens": -1}).usage.prompt_tokens == 256


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b'{"a":' * 100_000, b'{"prompt": 1' + b"0" * 5000 + b"}"])
def test_bodies_that_are_no_json(server: ModelServer, body: bytes) -> None:
    status, answer = send(server, body)
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"


def test_ten_megabytes_are_refused(server: ModelServer, client: Any) -> None:
    """With their length known, and unknown; without that much memory ever being held."""
    status, answer = send(server, b'{"prompt": "' + b"a" * 10_000_000 + b'"}')
    assert status == 413 and "1,000,000" in answer["error"]["message"]
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        chunks = iter([b"a" * 100_000] * 100)
        connection.request("POST", "/v1/completions", chunks, {"Content-Type": "application/json"}, encode_chunked=True)
        assert connection.getresponse().status == 413
    assert complete(client).choices[0].text


def test_only_this_machines_pages_may_ask(server: ModelServer) -> None:
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1}).encode()
    assert send(server, body, {"Host": "evil.example"})[0] == 403
    assert send(server, body, {"Host": "localhost.evil.example:8000"})[0] == 403
    assert send(server, body, {"Origin": "http://evil.example"})[0] == 403
    assert send(server, body, {"Origin": "null"})[0] == 403
    assert send(server, body, {"Content-Type": "text/plain"})[0] == 415
    own = f"127.0.0.1:{server.port}"
    assert send(server, body, {"Host": own, "Origin": f"http://{own}"})[0] == 200
    with closing(http.client.HTTPConnection("127.0.0.1", server.port)) as connection:
        connection.request("OPTIONS", "/v1/completions", headers={"Access-Control-Request-Method": "POST"})
        response = connection.getresponse()
        assert response.status == 405 and "Access-Control-Allow-Origin" not in response.headers


def test_the_page_and_paths_that_are_not(server: ModelServer) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port)) as connection:
        for path, status in (("/", 200), ("/page.js", 200), ("/health", 200), ("/nothing", 404), ("/../page.js", 404)):
            connection.request("GET", path)
            response = connection.getresponse()
            assert response.status == status
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]
            assert "unsafe" not in response.headers["Content-Security-Policy"]
            response.read()


# ---------------------------------------------------------------------------------------------------------------------
# clients that go, and clients that wait


@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_connection_ends_its_request(server: ModelServer, client: Any, stream: bool) -> None:
    body = json.dumps({"model": "tiny", "prompt": "a", **ENDLESS, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: server.engine.state()["tiny"]["running"] == 1)
        if stream:
            assert connection.recv(100)
    wait_until(lambda: is_idle(server))
    assert complete(client).choices[0].text


def test_half_a_body_and_a_closed_connection(server: ModelServer, client: Any) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
    assert complete(client).choices[0].text


@pytest.fixture
def narrow() -> Iterator[ModelServer]:
    """A server that draws one completion at a time, and lets one request wait."""
    with running([make_served("tiny", 0)], max_batch=1, max_queue=1, token="secret") as server:
        yield server


def test_a_full_queue_refuses_and_a_token_is_needed(narrow: ModelServer) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{narrow.url.partition('#')[0]}v1", api_key="secret", max_retries=0)
    with complete(client, extra_body=ENDLESS, stream=True) as running_stream:
        next(iter(running_stream))
        comments: list[str] = []

        def wait_in_queue() -> None:
            with client.completions.with_streaming_response.create(
                model="tiny", prompt="a", max_tokens=2, stream=True
            ) as waiting:
                comments.extend(waiting.iter_lines())

        waiting = threading.Thread(target=wait_in_queue)
        waiting.start()
        wait_until(lambda: narrow.engine.n_waiting == 1)
        with pytest.raises(openai.RateLimitError) as error:
            complete(client)
        assert error.value.response.headers["Retry-After"] and error.value.code == "queue_full"
    waiting.join()
    assert comments[0] == ": queue 1" and comments[-2:] == ["data: [DONE]", ""]

    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer s\u00e9cret"}):
        status, answer = send(narrow, b"{}", headers)
        assert status == 401 and answer["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="secrets").models.list()
    with closing(http.client.HTTPConnection("127.0.0.1", narrow.port)) as connection:
        for path, status in (("/", 200), ("/health", 200), ("/state", 401), ("/v1/models", 401)):
            connection.request("GET", path)
            response = connection.getresponse()
            assert response.status == status and response.read()


def test_an_error_in_the_model_ends_its_requests_alone(
    narrow: ModelServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{narrow.url.partition('#')[0]}v1", api_key="secret", max_retries=0)
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "advance", lambda *args, **options: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
            complete(client)
        with pytest.raises(openai.APIError):
            list(complete(client, stream=True))
        patch.setattr(Decoder, "advance", lambda *args, **options: exec("raise MemoryError"))
        with pytest.raises(openai.InternalServerError) as error:
            complete(client)
        assert error.value.status_code == 503
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert complete(client).choices[0].text


def test_other_addresses_get_a_token() -> None:
    with listen("0.0.0.0", 0) as listener:
        server = ModelServer([], Defaults(), ServerOptions(host="0.0.0.0"), listener)
    assert len(server.token) >= 32 and server.url.endswith(f"/#token={server.token}")


def test_a_host_that_is_not_is_named() -> None:
    with pytest.raises(UserError, match="--host"):
        listen("no.such.host.invalid", 0)


@pytest.mark.slow
def test_ctrl_c_ends_the_command_at_once(base: Path) -> None:
    """Also while a reply is streamed. Meanwhile its port is taken."""
    flags = ["--serve", f"--out_dir={base.parents[1]}", "--device=cpu", "--dtype=float32"]
    process = ScriptProcess(*flags, "--port=0", script="sample.py")
    line = process.stdout.readline()
    port = int(re.search(r"http://127.0.0.1:(\d+)/", line)[1])
    taken = run_script(*flags, f"--port={port}", script="sample.py", check=False)
    assert taken.returncode == 2 and f"--port={port}" in taken.stderr
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        body = json.dumps({"prompt": "1+1=", "stream": True, **ENDLESS})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        assert process.wait() == 130
        assert time.monotonic() - sent < 3
        assert b"the server is stopping" in response.read()
    assert process.stderr.read() == "interrupted\n"


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--serve", "--start=a", "--seed=1", "--num_samples=2"], ["--start", "--seed", "--num_samples"]),
        (["--serve", "--engine=llama.cpp", "--logprobs=2", "--compile"], ["--engine", "--logprobs", "--compile"]),
        (["--serve", "--prompt_dir=p"], ["--prompt_dir"]),
        (["--port=80", "--token=a"], ["--port", "--token"]),
        (["--out_dir", "a", "b"], ["--out_dir"]),
        (["--serve", "--port=70000"], ["--port=70000"]),
    ],
)
def test_flags_without_effect_are_refused(
    flags: list[str], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    import configurator
    import sample

    with pytest.raises(SystemExit):
        configurator.parse(sample.SampleArgs, flags, "", configurator.Rules(check=sample.check))
    errors = capsys.readouterr().err
    assert all(re.search(rf"^ *(\S+: )?{name}\b", errors, re.MULTILINE) for name in named), errors


def test_several_runs_are_named(tmp_path: Path) -> None:
    import sample

    runs = [str(tmp_path / name) for name in ("a", "b/a", "c")]
    for run in runs:
        Path(run).mkdir(parents=True)
    assert sample.spread_out_dir([f"--out_dir={runs[0]}", runs[2], "--serve"]) == [
        "--out_dir",
        runs[0],
        runs[2],
        "--serve",
    ]
    assert sample.spread_out_dir([f"--out_dir={runs[0]}", "x.py"]) == [f"--out_dir={runs[0]}", "x.py"]
    assert sample.name_models([runs[0], runs[2]]) == ["a", "c"]
    assert sample.name_models(runs) == runs
    assert sample.name_models(["org/name"]) == ["org/name"]
