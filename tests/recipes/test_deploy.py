"""examples/deploy: a recipe's run behind a page and an end point, which nothing sent to them brings down."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import ROOT
from toy import lines, script

for module in ("ctranslate2", "starlette", "uvicorn"):
    pytest.importorskip(module, reason=f"{module} is not there: pip install '.[deploy]'")

import convert  # noqa: E402
import serve  # noqa: E402

# what it takes for translations that end, and that depend on the source, within seconds
LEARN = {"EPOCHS": "30", "LR": "1e-2", "DROPOUT": "0", "WARMUP": "20", "SAVE_UPDATES": "10000", "LAST": "1"}
OPTIONS = (
    "--encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --encoder-attention-heads 2 --decoder-attention-heads 2"
    " --decoder-embed-dim 32 --decoder-output-dim 32 --num-workers 0 --required-batch-size-multiple 1"
    " --attention-dropout 0 --activation-dropout 0 --disable-validation --save-interval 10"
)


class Server:
    """serve.py as a user starts it, at a free port."""

    def __init__(self, run: Path, log: Path) -> None:
        command = [sys.executable, str(ROOT / "examples/deploy/serve.py"), str(run), "--port", "0"]
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out)
        while not (found := re.search(r"running on http://127.0.0.1:(\d+)", log.read_text())):
            assert self.process.poll() is None, log.read_text()
            time.sleep(0.1)
        self.port = int(found[1])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    def post(self, body: bytes) -> tuple[int, dict]:
        status, content = self.request("POST", "/translate", body)
        return status, json.loads(content)

    def translate(self, text: str) -> tuple[int, dict]:
        return self.post(json.dumps({"text": text}).encode())


@pytest.fixture(scope="module")
def folder(finished, once) -> Path:
    """A recipe's data and run, evaluated, and served once."""

    def make(folder: Path) -> None:
        shutil.copytree(finished("multi30k_de_en")[0] / "data", folder / "data")
        result = script("multi30k_de_en", "train", "evaluate", folder=folder, EXTRA=OPTIONS, BEAM="5", **LEARN)
        assert result.returncode == 0, result.stdout
        Server(folder / "run", folder / "log").stop()

    return once("deploy", make)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    server = Server(folder / "run", tmp_path_factory.mktemp("server") / "log")
    yield server
    assert server.process.poll() is None, server.log.read_text()
    assert "Traceback" not in server.log.read_text()
    server.stop()


def test_translates_as_fairseq_generate_does(folder, server):
    source, expected = lines(folder / "data/text/raw.test.de"), lines(folder / "run/test/hypotheses.txt")
    assert len(set(expected)) > 15  # of 25
    assert server.translate("\r\n".join(source)) == (200, {"translation": "\n".join(expected)})
    assert server.translate(f"\n\n{source[0]}\n \n{source[1]}\n") == (
        200,
        {"translation": f"\n\n{expected[0]}\n\n{expected[1]}"},
    )


def test_text_is_treated_as_by_the_recipe(folder, server, tmp_path):
    translator = serve.Translator(folder / "run" / "deploy")
    pieces = lines(folder / "data/text/bpe.test.de")
    assert [translator.encode(line) for line in lines(folder / "data/text/raw.test.de")] == [
        line.split() for line in pieces
    ]
    text = [
        "\u201eGröße\u201c \u2013 z.B. 3,5 m\u2026",
        "Ein\u00adHund & <b>Katze</b>\u200b usw.",
        "Straße\u2028 's geht's",
        "日本 \U0001f600",
    ]
    (tmp_path / "raw").write_text("".join(line + "\n" for line in text), encoding="utf-8")
    corpus = [sys.executable, ROOT / "examples/common/corpus.py"]
    options = ["--normalize", "--lowercase", "--workers", "1"]
    subprocess.run([*corpus, "tokenize", "de", tmp_path / "raw", tmp_path / "tok", *options], check=True)
    codes = folder / "data/text/codes"
    subprocess.run([*corpus, "bpe", codes, tmp_path / "tok", tmp_path / "bpe", "--workers", "1"], check=True)
    assert [translator.encode(line) for line in text] == [line.split() for line in lines(tmp_path / "bpe")]
    assert translator.decode(["don", "&apos;t", "s@@", "top", ",", "&quot;", "ok", "&quot;"]) == 'don\'t stop, "ok"'


BAD = [
    (b"", 400, "send JSON"),
    (b"{", 400, "send JSON"),
    (b'{"text": 3}', 400, "send JSON"),
    (b'["text"]', 400, "send JSON"),
    (b"[" * 100_000, 400, "send JSON"),
    (b'{"text": ""}', 400, "the text is empty"),
    (b'{"text": " \\n\\t\\n"}', 400, "the text is empty"),
    (b'{"text": "\\u200b\\n\\u00ad"}', 400, "the text is empty"),
    (b'{"text": "a\xff"}', 400, "the text is not valid UTF-8"),
    (b'{"text": "\\ud800"}', 400, "the text is not valid UTF-8"),
    (b'{"text": "a\\u0000b"}', 400, "the text has a control character, U+0000"),
    (b'{"text": "\\u001b[31m"}', 400, "the text has a control character, U+001B"),
    (json.dumps({"text": "x" * 100_000}).encode(), 413, "100,000 characters of at most 5,000"),
    (b"x" * 3_000_000, 413, "at most 5,000 characters"),
    (json.dumps({"text": "a\n" * 51}).encode(), 413, "51 lines of at most 50"),
    (json.dumps({"text": "a " * 300}).encode(), 413, "a line is too long: at most 250 tokens"),
]


@pytest.mark.parametrize(("body", "status", "needle"), BAD, ids=[str(body[:24]) for body, *_ in BAD])
def test_bad_input_gets_one_line(server, body, status, needle):
    found, answer = server.post(body)
    assert (found, list(answer)) == (status, ["error"])
    assert needle in answer["error"]
    assert "\n" not in answer["error"]
    assert server.translate("ein kind lacht .")[0] == 200


def test_other_requests(server):
    status, page = server.request("GET", "/")
    assert status == 200
    assert "<title>de to en</title>" in page
    assert "//" not in page  # no address elsewhere
    assert server.request("GET", "/x") == (404, '{"error":"Not Found"}')
    assert server.request("GET", "/translate") == (405, '{"error":"Method Not Allowed"}')
    assert server.request("POST", "/translate", b'{"text": "a"}', Host="example.com") == (400, "Invalid host header")


def test_who_leaves_and_who_does_not_speak_http(server):
    for sent in (
        b"POST /translate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{",
        b"\x16\x03\x01\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(sent)
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(serve.MAX_CONNECTIONS)]
    try:
        while server.request("GET", "/") != (503, "Service Unavailable"):
            time.sleep(0.1)
    finally:
        for connection in idle:
            connection.close()
    while server.request("GET", "/")[0] != 200:
        time.sleep(0.1)
    assert server.translate("ein kind lacht .")[0] == 200


def test_200_requests_at_once(folder, server):
    source, expected = lines(folder / "data/text/raw.test.de"), lines(folder / "run/test/hypotheses.txt")
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(server.translate, source * 8))
        assert answers == [(200, {"translation": line}) for line in expected * 8]
        answers = list(pool.map(server.translate, ["\n".join(source * 2)] * 200))
    refused = (503, {"error": "too many requests are waiting; try again later"})
    assert {status for status, _ in answers} == {200, 503}
    assert all(answer in (refused, (200, {"translation": "\n".join(expected * 2)})) for answer in answers)
    assert server.translate(source[0]) == (200, {"translation": expected[0]})


def test_stops_once_all_are_answered(folder, server, tmp_path):
    ours = Server(folder / "run" / "deploy", tmp_path / "log")  # what convert.py made: no fairseq, no torch
    assert "torch" not in Path(f"/proc/{ours.process.pid}/maps").read_text()
    text = "\n".join(lines(folder / "data/text/raw.test.de") * 2)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ours.translate, text) for _ in range(4)]
        time.sleep(0.2)
        ours.process.send_signal(signal.SIGTERM)
        assert [answer.result()[0] for answer in answers] == [200] * 4
    assert ours.process.wait(timeout=60) in (0, -signal.SIGTERM)
    assert "Traceback" not in ours.log.read_text()


def test_benchmark(folder):
    command = [sys.executable, "-m", "benchmarks.deploy", folder / "run", "--repeat", "1"]
    printed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    rows = [re.split(r" *\| *", line)[1:-1] for line in printed if line.startswith("|")]
    fairseq = ["stock fairseq-generate", "fairseq-generate", "fairseq-generate --bf16"]
    assert [row[0] for row in rows[2:]] == [*fairseq, "CTranslate2 float32", "CTranslate2 int8"]
    assert rows[3][1:5] == rows[5][1:5] == [*rows[2][1:4], "25 of 25"]
    scores = json.loads((folder / "run/test/scores.json").read_text())
    assert rows[2][1:4] == [f"{score['score']:.2f}" for name, score in scores.items() if name != "checkpoints"]


def test_in_a_browser(folder, server, browser):
    source, expected = lines(folder / "data/text/raw.test.de")[:2], lines(folder / "run/test/hypotheses.txt")[:2]
    page = browser.new_page()
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(f"http://127.0.0.1:{server.port}/")
    text, button = page.get_by_label("One sentence a line"), page.get_by_role("button", name="Translate")
    status, translation = page.locator("#status"), page.locator("#translation")

    def shows(field, content):
        script = "([id, content]) => document.querySelector(id).textContent === content"
        page.wait_for_function(script, arg=[field, content])

    assert page.title() == page.get_by_role("heading", level=1).text_content() == "German to English"
    assert page.get_by_text("or Ctrl+Enter").is_visible()
    text.press_sequentially(source[0])
    button.click()
    shows("#translation", expected[0])
    text.press("Enter")
    text.press_sequentially(source[1])
    text.press("Control+Enter")
    shows("#translation", "\n".join(expected))
    assert translation.get_attribute("class") in (None, "")
    text.fill("")
    button.click()
    shows("#status", "the text is empty")
    assert translation.text_content() == "\n".join(expected)  # the last one stays, marked
    assert translation.get_attribute("class") == "old"
    assert page.get_by_role("heading", name="Translation of an earlier text").is_visible()
    text.fill("<b>x</b>" * 12_500)
    button.click()
    shows("#status", "the text is too long: 100,000 characters of at most 5,000")
    page.route("**/translate", lambda route: route.abort())
    text.fill(source[0])
    button.click()
    shows("#status", "the translator does not answer")
    assert translation.text_content() == "\n".join(expected)
    page.unroute("**/translate")
    button.click()
    shows("#translation", expected[0])
    assert status.text_content() == "" and translation.get_attribute("class") == ""
    assert page.get_by_role("heading", name="Translation", exact=True).is_visible()
    assert not errors
    assert {url.rsplit("/", 1)[0] for url in requests} == {f"http://127.0.0.1:{server.port}"}


def test_the_page_says_which_model_and_copies(folder, server, browser):
    bleu = json.loads((folder / "run/test/scores.json").read_text())["detokenised sacreBLEU"]["score"]
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/")
    model = page.get_by_text("Model: ").text_content()
    assert re.fullmatch(rf"Model: {folder.name}/run, [\d,]+ updates, BLEU {bleu:.1f}", model)
    copy = page.get_by_role("button", name="Copy")
    assert copy.is_disabled()
    page.get_by_label("One sentence a line").fill(lines(folder / "data/text/raw.test.de")[0])
    page.get_by_role("button", name="Translate").click()
    copy.click()
    page.get_by_text("copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == lines(folder / "run/test/hypotheses.txt")[0]
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject() }")
    copy.click()
    page.get_by_text("selected: Ctrl+C copies it").wait_for()
    assert page.evaluate("getSelection().toString()") == lines(folder / "run/test/hypotheses.txt")[0]


@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_on_a_phone_and_in_the_dark(server, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.evaluate("document.querySelector('#translation').textContent = 'x'.repeat(500)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for button in page.get_by_role("button").all():
        assert min(button.bounding_box()[side] for side in ("width", "height")) >= 24
    # the canvas of the root, which forms and scroll bars follow too
    colours = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours[scheme] = page.evaluate("getComputedStyle(document.body).color")
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light dark"
    assert colours == {"light": "rgb(0, 0, 0)", "dark": "rgb(255, 255, 255)"}


def test_waiting_requests_are_one_batch_and_an_error_ends_only_its_own():
    batches = []
    at_work = threading.Event()

    class Translator:
        def translate(self, texts):
            batches.append(texts)
            at_work.wait(timeout=10)
            if ["bad"] in texts:
                raise RuntimeError("no such word")
            return [[line.upper() for line in lines] for lines in texts]

    async def ask():
        batcher = serve.Batcher(Translator())
        worker = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher.translate(["bad"]))
        while not batches:
            await asyncio.sleep(0.01)
        others = [asyncio.create_task(batcher.translate([str(number), "x"])) for number in range(40)]
        await asyncio.sleep(0.01)
        at_work.set()
        answers = await asyncio.gather(first, *others, return_exceptions=True)
        worker.cancel()
        assert batcher.waiting == 0
        return answers

    first, *others = asyncio.run(ask())
    assert isinstance(first, RuntimeError)
    assert serve.refuse(None, first).body == b'{"error":"internal error"}'
    assert others == [[str(number), "X"] for number in range(40)]
    assert [len(batch) for batch in batches] == [1, 32, 8]  # 64 lines


@pytest.fixture
def calls(monkeypatch):
    """convert.py's commands, which are not run."""
    calls = []

    def call(*command):
        calls.append([str(word) for word in command])
        if "--output_dir" in command:
            command[command.index("--output_dir") + 1].mkdir()

    monkeypatch.setattr(convert, "call", call)
    monkeypatch.setattr(convert, "updates_of", lambda checkpoint: 1200)
    return calls


def make_demo(folder: Path) -> None:
    for path in ("runs/admin/checkpoint_last.pt", "data/bin/test.de-en.de.idx", "data/codes"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def test_who_left_is_not_translated_for():
    batches = []

    class Translator:
        def translate(self, texts):
            batches.append(texts)
            time.sleep(0.05)
            return texts

    async def ask():
        batcher = serve.Batcher(Translator())
        worker = asyncio.create_task(batcher.run())
        first, second, third = (asyncio.create_task(batcher.translate([word])) for word in ("one", "two", "three"))
        await asyncio.sleep(0.01)
        fourth = asyncio.create_task(batcher.translate(["four"]))
        await asyncio.sleep(0)
        fourth.cancel()
        await asyncio.gather(first, second, third)
        assert await batcher.translate(["five"]) == ["five"]
        worker.cancel()

    asyncio.run(ask())
    assert "four" not in str(batches)


def test_a_client_that_closes_its_connection_has_left():
    """Before its turn nothing is translated for it; while it is, the others' answers come all the same."""
    batches, go_on = [], threading.Event()

    class Translator:
        source, target, description = "de", "en", "a run"

        def translate(self, texts):
            batches.append(texts)
            go_on.wait(timeout=20)
            return texts

    def post(text):
        connection = socket.create_connection(("127.0.0.1", port))
        body = json.dumps({"text": text}).encode()
        head = f"POST /translate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        app = serve.application(Translator())
        server = serve.uvicorn.Server(serve.uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            first = post("one")
            while not batches:
                time.sleep(0.02)
            second, third = post("two"), post("three")
            while app.state.batcher.waiting < len("onetwothree"):
                time.sleep(0.02)
            first.close()
            second.close()
            while app.state.batcher.waiting > len("three"):
                time.sleep(0.02)
            go_on.set()
            answer = b""
            while not answer.endswith(b"}"):
                answer += third.recv(4096)
            third.close()
            assert answer.endswith(b'{"translation":"three"}')
            assert batches == [[["one"]], [["three"]]]
        finally:
            go_on.set()
            server.should_exit = True
            thread.join()


@pytest.fixture
def echo(monkeypatch):
    """The port of a server that answers with the text, with a short patience."""

    class Translator:
        source, target, description = "de", "en", "a run"

        def translate(self, texts):
            return texts

    monkeypatch.setattr(serve, "HEAD_SECONDS", 1)
    monkeypatch.setattr(serve, "BODY_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listening:
        config = serve.uvicorn.Config(
            serve.application(Translator()),
            http=serve.Connection,
            log_level="critical",
            limit_concurrency=serve.MAX_CONNECTIONS,
            timeout_graceful_shutdown=1,
        )
        server = serve.uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def ask(port, source="127.0.0.1", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30, source_address=(source, 0))
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", "/translate", b'{"text": "a"}', headers)
    answer = connection.getresponse()
    status, body = answer.status, answer.read()
    connection.close()
    return status, body


HALVES = [b"", b"POST /translate HTTP/1.1\r\nHost: loc", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HTT"]
BODY_MISSING = b"POST /translate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"


@pytest.mark.parametrize("half", [*HALVES, BODY_MISSING])
def test_half_sent_requests_shut_nobody_out(echo, half):
    """As many as there are connections, from one address: others are served at once, this one once they time out."""
    opened = [socket.create_connection(("127.0.0.1", echo)) for _ in range(serve.MAX_CONNECTIONS)]
    for connection in opened:
        try:
            connection.sendall(half)
        except ConnectionError:
            assert half  # refused before
    started = time.time()
    assert ask(echo, source="127.0.0.2") == (200, b'{"translation":"a"}')
    assert time.time() - started < 5
    while ask(echo)[0] != 200:
        assert time.time() - started < 20
        time.sleep(0.1)
    for connection in opened:
        connection.settimeout(10)
        try:
            answer = b"".join(iter(lambda: connection.recv(4096), b""))  # noqa: B023  (ends where the server closed it)
        except ConnectionError:
            answer = b""
        connection.close()
        assert half != BODY_MISSING or answer[9:12] in (b"408", b"503", b"")


@pytest.mark.parametrize("half", [HALVES[1], BODY_MISSING])
def test_half_sent_requests_give_way_where_all_places_are_taken(echo, half, monkeypatch):
    for name in ("HEAD_SECONDS", "BODY_SECONDS"):
        monkeypatch.setattr(serve, name, 60)
    opened, started = [], time.time()
    for number in range(2 * serve.MAX_CLIENT_CONNECTIONS):
        source = (f"127.0.0.{2 + number % 2}", 0)  # two clients, none of which takes more than it may
        opened.append(socket.create_connection(("127.0.0.1", echo), source_address=source))
        opened[-1].sendall(half)
    while ask(echo)[0] != 200:  # what gave way is still ending
        assert time.time() - started < 20
        time.sleep(0.1)
    assert [ask(echo)[0] for _ in range(5)] == [200] * 5
    for connection in opened:
        connection.close()


def test_bytes_that_trickle_in_are_no_request(echo):
    with socket.create_connection(("127.0.0.1", echo)) as connection:
        started = time.time()
        with pytest.raises(ConnectionError):
            while time.time() - started < 10:
                connection.sendall(b"GET / HTTP/1.1\r\n" if time.time() - started < 0.1 else b"a: b\r\n")
                time.sleep(0.1)
    assert time.time() - started < 5


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://example.com", "Content_Type": "text/plain"}, 403),
        ({"Origin": "null", "Content_Type": "text/plain;charset=UTF-8"}, 403),
        ({"Origin": "http://127.0.0.1:1", "Content_Type": "application/json"}, 403),
        ({"Sec_Fetch_Site": "cross-site", "Content_Type": "text/plain"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Sec_Fetch_Site": "same-origin", "sec_fetch_site": "cross-site"}, 403),
        ({"Origin": "http://[evil"}, 403),
        ({"Origin": "https://a.example.com", "X_Forwarded_Host": "a.example.com", "x_forwarded_host": "b"}, 403),
        ({"Origin": "http://127.0.0.1:{port}", "X_Forwarded_Host": "a.example.com"}, 403),
        ({"Sec_Fetch_Site": "same-origin", "Origin": "https://translate.example.com"}, 200),  # behind a proxy
        ({"Origin": "https://translate.example.com", "X_Forwarded_Host": "translate.example.com"}, 200),
        ({"Origin": "http://127.0.0.1:{port}", "Content_Type": "text/plain"}, 200),  # our page
        ({"Content_Type": "application/x-www-form-urlencoded"}, 200),  # curl --data
    ],
)
def test_pages_of_other_sites(echo, headers, status):
    found, answer = ask(echo, **{name: value.replace("{port}", str(echo)) for name, value in headers.items()})
    assert found == status
    if status == 403:
        assert answer == b'{"error":"only the translator\'s own page may use it from a browser"}'


def test_one_client_may_not_fill_the_queue():
    async def ask_all():
        batcher = serve.Batcher(None)  # nobody translates
        text = "x" * (serve.MAX_CLIENT_WAITING // 2 - 1)
        waiting = [asyncio.create_task(batcher.translate([text], client)) for client in ("a", "a")]
        await asyncio.sleep(0)
        with pytest.raises(serve.HTTPException, match="too many requests"):
            await batcher.translate(["three"], "a")
        waiting.append(asyncio.create_task(batcher.translate(["other"], "b")))
        await asyncio.sleep(0)
        for task in waiting:
            assert not task.done()
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert (batcher.waiting, dict(batcher.waiting_of)) == (0, {})

    asyncio.run(ask_all())


@pytest.mark.parametrize("port", ["99999", "taken"])
def test_a_port_that_cannot_be_had(monkeypatch, port, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1]) if port == "taken" else port
        monkeypatch.setattr(sys, "argv", ["serve.py", str(tmp_path), "--port", port])
        with pytest.raises(SystemExit, match=f"error: cannot listen on port {port}: "):
            serve.main()


def test_folder_of_make_demo(calls, tmp_path):
    demo, out = tmp_path / "demo", tmp_path / "out"
    make_demo(demo)
    convert.convert(demo, out, quantization="int8")
    assert calls[0][-2] == str(demo / "runs/admin/checkpoint_last.pt")
    assert calls[1][-2:] == ["--quantization", "int8"]
    assert json.loads((out / "text.json").read_text()) == {
        "source": "de",
        "target": "en",
        "tokenize": {"lowercase": True},
        "search": {"beam_size": 5, "length_penalty": 1.0},
        "model": f"{tmp_path.name}/demo, 1,200 updates",
    }
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["demo", "out"]


def test_converts_again_what_is_older_than_the_checkpoint(calls, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(serve, "Translator", started.append)
    monkeypatch.setattr(serve, "application", lambda translator: None)
    monkeypatch.setattr(serve.uvicorn, "run", lambda app, **settings: None)
    monkeypatch.setattr(sys, "argv", ["serve.py", str(tmp_path)])
    make_demo(tmp_path)
    for age, times in ((0, 1), (0, 1), (10, 2)):
        checkpoint = tmp_path / "runs/admin/checkpoint_last.pt"
        os.utime(checkpoint, (time.time() + age - 5,) * 2)
        serve.main()
        assert len(calls) == 2 * times
    assert started == [tmp_path / "deploy"] * 3


def test_what_cannot_be_converted(folder, tmp_path):
    def message(*arguments):
        command = [sys.executable, ROOT / "examples/deploy/convert.py", *arguments]
        finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert finished.returncode == 1
        return finished.stdout.splitlines()

    assert message(tmp_path, tmp_path / "out")[0].startswith(f"error: {tmp_path} holds no checkpoint")
    (tmp_path / "checkpoint_last.pt").write_bytes(b"no checkpoint")
    assert "has no settings.json of train.sh" in message(tmp_path, tmp_path / "out")[0]
    shutil.copy(folder / "run/settings.json", tmp_path)
    assert "does not say how the text was treated" in message(tmp_path, tmp_path / "out", "--data", tmp_path)[0]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    assert "exists, and is not what convert.py makes" in message(folder / "run", tmp_path / "mine")[0]
    assert "exists, and is not what convert.py makes" in message(folder / "run", folder / "run")[0]
    assert (tmp_path / "mine/thesis.txt").exists()
    assert "cannot write /proc/x" in message(folder / "run", "/proc/x")[-1]
    printed = message(tmp_path, tmp_path / "out")
    assert not list(tmp_path.glob("*.tmp"))
    assert "admin_fairseq fold" in printed[-1]
    assert "checkpoint_last.pt" in printed[-2]
    assert not (tmp_path / "out").exists()
