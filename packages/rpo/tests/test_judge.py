"""The judge, against a server that speaks OpenAI's protocol as badly as is asked of it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote

import pytest

from decathlon.rpo.judge import Judge, Sample, judge_samples, key_from_environment
from decathlon.shared.errors import UserError

Answer = Callable[[dict[str, Any]], "tuple[int, str]"]


class Server:
    """Answers POSTs by a function of the request's JSON, and remembers them."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.answer: Answer = lambda _: (200, said("Better: A"))
        self.headers: dict[str, str] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), content))
                status, text = outer.answer(content)
                self.send_response(status)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


def said(text: str | None) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def shown(content: dict[str, Any], place: str, answer: str = "reply") -> str:
    text = content["messages"][0]["content"]
    return text.split(f"<{answer} {place}>\n")[1].split(f"\n</{answer} {place}>")[0]


SAMPLES: list[Sample] = [
    {"prompt": f"question {number}", "chosen": f"long answer {number}", "policy": f"short {number}"}
    for number in range(40)
]


def test_what_is_asked(server: Server) -> None:
    judge = Judge(server.url + "/", "gpt-4-0613", api_key="secret")
    assert judge.compare("the prompt", "the first", "the second") == "A"
    path, headers, content = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert content["model"] == "gpt-4-0613" and content["temperature"] == 0
    assert shown(content, "A") == "the first" and shown(content, "B") == "the second"
    assert "the prompt" in content["messages"][0]["content"]


def test_summaries_are_asked_otherwise_and_no_key_is_needed(server: Server) -> None:
    Judge(server.url + "/chat/completions", task="summary").compare("post", "one", "two")
    path, headers, content = server.requests[0]
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert shown(content, "A", "summary") == "one" and "summaries" in content["messages"][0]["content"]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A is kinder.\nBetter: A", "A"),
        ("A is kinder.\n**Better: B**", "B"),
        ("better: b.", "B"),
        ("Better: A\nNo, wait.\nBetter: B", "B"),
        ("Both are good.", None),
        ("Better: A or B", None),
        ("A", None),
        ("Better: C", None),
        ("", None),
        (None, None),
    ],
)
def test_verdicts(server: Server, text: str | None, verdict: str | None) -> None:
    server.answer = lambda _: (200, said(text))
    assert Judge(server.url).compare("p", "x", "y") == verdict


def test_the_place_does_not_matter(server: Server) -> None:
    """A judge that prefers the shorter says so wherever it stands; one that always says A is even on average."""

    def shorter(content: dict[str, Any]) -> tuple[int, str]:
        return 200, said("Better: A" if len(shown(content, "A")) < len(shown(content, "B")) else "Better: B")

    server.answer = shorter
    assert judge_samples(Judge(server.url), SAMPLES) == [True] * 40
    first = [shown(content, "A").startswith("short") for _, _, content in server.requests]
    assert 10 < sum(first) < 30
    server.answer = lambda _: (200, said("Better: A"))
    found = judge_samples(Judge(server.url), SAMPLES)
    assert 10 < sum(map(bool, found)) < 30
    assert judge_samples(Judge(server.url), SAMPLES, workers=1) == found, "the order depends on the seed alone"
    assert judge_samples(Judge(server.url), SAMPLES, seed=1) != found


def test_who_does_not_decide_counts_for_nobody(server: Server) -> None:
    def sometimes(content: dict[str, Any]) -> tuple[int, str]:
        return 200, said("Hard to say." if "question 3" in content["messages"][0]["content"] else "Better: A")

    server.answer = sometimes
    found = judge_samples(Judge(server.url), SAMPLES)
    assert [number for number, verdict in enumerate(found) if verdict is None] == [3, *range(30, 40)]


def test_it_is_asked_again_when_it_is_busy(server: Server) -> None:
    waits: list[float] = []
    statuses = iter([429, 503, 200])
    server.answer = lambda _: (next(statuses), said("Better: B"))
    assert Judge(server.url, sleep=waits.append).compare("p", "x", "y") == "B"
    assert waits == [1.0, 2.0]
    server.answer, server.headers = (lambda _: (429, "slow down")), {"Retry-After": "7"}
    with pytest.raises(ConnectionError, match="gives no answer: HTTP 429 slow down"):
        Judge(server.url, sleep=waits.append, retries=2).compare("p", "x", "y")
    assert waits[2:] == [7.0, 7.0]


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [
        (401, '{"error": "no such\\n key"}', "refuses: HTTP 401"),
        (404, "no such model", "HTTP 404 no such model"),
        (200, "<html>", "does not answer by OpenAI's chat protocol"),
        (200, "{}", "does not answer by OpenAI's chat protocol"),
        (200, '{"choices": []}', "does not answer by OpenAI's chat protocol"),
    ],
)
def test_refusals_are_not_repeated(server: Server, status: int, text: str, message: str) -> None:
    server.answer = lambda _: (status, text)
    with pytest.raises(UserError, match=message):
        Judge(server.url).compare("p", "x", "y")
    assert len(server.requests) == 1


def test_the_key_follows_no_redirect(server: Server) -> None:
    server.headers = {"Location": server.url + "/elsewhere"}
    server.answer = lambda _: (302, "")
    with pytest.raises(UserError, match="HTTP 302"):
        Judge(server.url, api_key="secret").compare("p", "x", "y")
    assert len(server.requests) == 1


def test_an_error_ends_all_questions(server: Server) -> None:
    server.answer = lambda _: (403, "forbidden")
    with pytest.raises(UserError, match="forbidden"):
        judge_samples(Judge(server.url), SAMPLES * 20, workers=2)
    assert len(server.requests) < 100


def test_out_of_reach() -> None:
    waits: list[float] = []
    with pytest.raises(ConnectionError, match=r"the judge at http://127.0.0.1:9/v1/chat/completions gives no answer"):
        Judge("http://127.0.0.1:9/v1", retries=1, sleep=waits.append).compare("p", "x", "y")
    assert waits == [1.0]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "api.openai.com/v1", "http://", ""])
def test_bad_urls(url: str) -> None:
    with pytest.raises(UserError, match="judge must be a URL"):
        Judge(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hunter2@host/v1",
        "me:hunter2@host/v1",
        "ftp://me:hunter2@host",
        "https://host/v1?key=hunter2",
        "https://host/v1#hunter2",
        "https://[host",
        "https://host:port/v1",
        "https://host/a b",
    ],
)
def test_urls_with_secrets_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError, match="judge must be a URL") as caught:
        Judge(url)
    assert "hunter2" not in str(caught.value)


def test_bad_task() -> None:
    with pytest.raises(UserError, match="task must be one of dialogue, summary"):
        Judge("http://localhost/v1", task="poem")


def test_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "k")
    monkeypatch.setenv("EMPTY_KEY", "")
    assert key_from_environment("MY_KEY") == "k" and key_from_environment("EMPTY_KEY") is None


def test_a_line_end_after_the_key_is_not_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", " sk-secret-1\r\n")
    Judge(server.url, api_key=key_from_environment("MY_KEY")).compare("p", "x", "y")
    Judge(server.url, api_key="sk-secret-1\n").compare("p", "x", "y")
    assert [headers["Authorization"] for _, headers, _ in server.requests] == ["Bearer sk-secret-1"] * 2


@pytest.mark.parametrize(
    "key", ["sk-secret\nHost: x", "sk-secret\x00", "sk-secret\x7f", "sk-secret-ä", "sk-secret\u2028x"]
)
def test_keys_that_cannot_be_sent(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {"MY_KEY": key})
    with pytest.raises(UserError, match=r"^MY_KEY holds characters") as caught:
        key_from_environment("MY_KEY")
    with pytest.raises(UserError, match=r"^api_key holds characters") as direct:
        Judge("http://localhost/v1", api_key=key)
    assert "secret" not in f"{caught.value}{direct.value}"


@pytest.mark.parametrize("status", [401, 429, 200])
@pytest.mark.parametrize("key", ["sk-secret-1", 'sk-"secret"/\\1'])
def test_a_server_that_repeats_the_key(server: Server, status: int, key: str) -> None:
    """Also where the message is cut in the midst of it."""
    for before in ("", "x" * 193):
        server.answer = lambda _, before=before: (
            status,
            before + f"unknown {key} and {json.dumps(key)}, {quote(key, '')}",
        )
        with pytest.raises((UserError, ConnectionError), match=r"\*\*\*" if not before else "xxx") as caught:
            Judge(server.url, api_key=f"{key}\n", retries=0).compare("p", "x", "y")
        assert "sk-" not in str(caught.value) and "secret" not in str(caught.value)


def test_what_is_no_http_is_one_line() -> None:
    """A port on which something else answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ConnectionError, match="gives no answer: SSH"):
            Judge(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", retries=0, timeout=10).compare("p", "x", "y")
