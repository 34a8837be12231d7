"""A translator on this machine: a page for the browser, and POST /translate {"text": ...} -> {"translation": ...}.

    python serve.py RUN

RUN is that of a recipe's train.sh, the folder of `make demo`, or what convert.py made of either. Each line of the text
is a sentence, and is treated as the recipe treats its test set. What is refused is answered with {"error": ...}.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import html
import json
import socket
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import AsyncIterator

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "common")]

from convert import add_options, checkpoint_of, convert  # noqa: E402
from corpus import make_bpe, make_tokenizer  # noqa: E402

try:
    import ctranslate2
    import uvicorn
    from sacremoses import MosesDetokenizer
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    sys.exit(f"error: {error}; pip install '.[deploy]' brings what is missing")

# of a request
MAX_CHARACTERS = 5000
MAX_LINES = 50
MAX_PIECES = 250  # of BPE, in one line
MAX_BYTES = 2**20  # so much is read, to be able to say what is wrong with it
HEAD_SECONDS = 10  # until its headers are there
BODY_SECONDS = 20  # and then its text
# of a client, by its address
MAX_CLIENT_CONNECTIONS = 300
MAX_CLIENT_WAITING = 20_000  # characters
# of all requests
MAX_WAITING = 30_000  # characters, about half a minute's work of a 6-6 model on one core
MAX_CONNECTIONS = 400
BATCH_LINES = 64  # no request joins a batch that has so many
BATCH_PIECES = 4000  # translated at once, with padding
MAX_LENGTH = 200  # of a translation; fairseq-generate's default
MAX_CACHE = 100_000  # words whose BPE is remembered


class Translator:
    """Sentences to sentences, by what convert.py wrote to ``folder``."""

    def __init__(self, folder: Path) -> None:
        text = json.loads((folder / "text.json").read_text("utf-8"))
        self.source, self.target, self.search = text["source"], text["target"], text["search"]
        self.description = text.get("model", folder.name)
        self.tokenize = make_tokenizer(self.source, **text["tokenize"])
        self.bpe = make_bpe(folder / "codes")
        self.detokenize = MosesDetokenizer(lang=self.target).detokenize
        self.model = ctranslate2.Translator(str(folder))

    def encode(self, line: str) -> list[str]:
        cache = self.bpe.__self__.cache  # grows with every new word
        if len(cache) > MAX_CACHE:
            cache.clear()
        return self.bpe(self.tokenize(line)).split()

    def decode(self, pieces: list[str]) -> str:
        return self.detokenize((" ".join(pieces) + " ").replace("@@ ", "").split())

    def translate(self, texts: list[list[str]]) -> list[list[str] | None]:
        """Each text's lines, all in one batch; None for a text with a line of too many pieces."""
        encoded = [[self.encode(line) for line in lines] for lines in texts]
        fits = [all(len(line) <= MAX_PIECES for line in lines) for lines in encoded]
        sources = [line for lines, fit in zip(encoded, fits) if fit for line in lines if line]
        limits = {"max_batch_size": BATCH_PIECES, "batch_type": "tokens", "max_decoding_length": MAX_LENGTH}
        results = iter(self.model.translate_batch(sources, **limits, **self.search))
        return [
            [self.decode(next(results).hypotheses[0]) if line else "" for line in lines] if fit else None
            for lines, fit in zip(encoded, fits)
        ]


class Batcher:
    """Requests that arrive while a batch is at work make up the next one."""

    def __init__(self, translator: Translator) -> None:
        self.translator = translator
        self.queue: asyncio.Queue = asyncio.Queue()
        self.waiting = 0
        self.waiting_of: Counter[str] = Counter()  # a client

    async def translate(self, lines: list[str], client: str = "") -> list[str]:
        size = sum(map(len, lines))
        if self.waiting + size > MAX_WAITING or self.waiting_of[client] + size > MAX_CLIENT_WAITING:
            raise HTTPException(503, "too many requests are waiting; try again later", {"Retry-After": "1"})
        result = asyncio.get_running_loop().create_future()
        self.waiting += size
        self.waiting_of[client] += size
        self.queue.put_nowait((lines, result))
        try:
            translation = await result
        finally:
            self.waiting -= size
            self.waiting_of[client] -= size
            self.waiting_of += Counter()  # keeps those above zero
        if translation is None:
            raise HTTPException(413, f"a line is too long: at most {MAX_PIECES} tokens after BPE")
        return translation

    async def run(self) -> None:
        while True:
            batch = [await self.queue.get()]
            while not self.queue.empty() and sum(len(lines) for lines, _ in batch) < BATCH_LINES:
                batch.append(self.queue.get_nowait())
            batch = [(lines, result) for lines, result in batch if not result.done()]  # done: the client has left
            if not batch:
                continue
            error, translations = None, [None] * len(batch)
            try:
                translations = await asyncio.to_thread(self.translator.translate, [lines for lines, _ in batch])
            except Exception as raised:  # the next batch may go well
                error = raised
            for (_, result), translation in zip(batch, translations):
                if result.done():
                    continue
                if error is not None:
                    result.set_exception(error)
                else:
                    result.set_result(translation)


class Connection(H11Protocol):
    """uvicorn's, with an end to a client's patience: half-sent requests and their number are limited."""

    made: float  # when
    waits_for_head: asyncio.TimerHandle | None = None
    is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.made = self.loop.time()
        self.waits_for_head = self.loop.call_later(HEAD_SECONDS, transport.close)
        if sum(other.client[0] == self.client[0] for other in self.connections) > MAX_CLIENT_CONNECTIONS:
            self.is_refused = True
            self.connections.discard(self)  # it takes no place from others
            transport.write(
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nContent-Length: 19\r\n"
                b"Connection: close\r\n\r\nService Unavailable"
            )
            transport.write_eof()
            self.loop.call_later(1, transport.close)  # at once, and the client could lose the answer
        elif len(self.connections) >= MAX_CONNECTIONS:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        if self.is_refused:
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._head_is_there()
        elif self.waits_for_head is None:
            self.waits_for_head = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_there()
        super().connection_lost(exc)

    def _make_room(self) -> None:
        """The oldest connection without a whole request gives way, of the client with the most of them."""
        idle = [
            other
            for other in self.connections - {self}
            if isinstance(other, Connection)
            and (other.cycle is None or other.cycle.response_complete or other.cycle.more_body)
        ]
        number = Counter(other.client[0] for other in idle)
        if idle:
            oldest = max(idle, key=lambda other: (number[other.client[0]], -other.made))
            self.connections.discard(oldest)
            oldest.transport.abort()

    def _head_is_there(self) -> None:
        if self.waits_for_head is not None:
            self.waits_for_head.cancel()
            self.waits_for_head = None


def refuse_other_sites(request: Request) -> None:
    """A page of another site may send text here without asking, if it says that it is text/plain.

    Raises:
        HTTPException: the browser says that it is such a page's request.
    """
    sites, origins, proxied, hosts = map(
        request.headers.getlist, ("sec-fetch-site", "origin", "x-forwarded-host", "host")
    )
    if sites:
        is_own = {*sites} <= {"same-origin", "none"}
    else:  # not a browser, or an old one, which lets no page set X-Forwarded-Host
        is_own = all(origin.split("://")[-1] == host for origin in origins for host in proxied or hosts)
    if not is_own:
        raise HTTPException(403, "only the translator's own page may use it from a browser")


async def read_lines(request: Request) -> list[str]:
    """The lines of the request's text.

    Raises:
        HTTPException: it is refused.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise HTTPException(413, f"the text is too long: at most {MAX_CHARACTERS:,} characters")
    try:
        text = json.loads(body.decode("utf-8"))["text"]
        text.encode("utf-8")  # "\ud800" is JSON, but no text
    except UnicodeError:
        raise HTTPException(400, "the text is not valid UTF-8") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise HTTPException(400, 'send JSON: {"text": "..."}') from None
    if len(text) > MAX_CHARACTERS:
        raise HTTPException(413, f"the text is too long: {len(text):,} characters of at most {MAX_CHARACTERS:,}")
    lines = [line.rstrip("\r") for line in text.rstrip("\r\n").split("\n")]
    if len(lines) > MAX_LINES:
        raise HTTPException(413, f"the text is too long: {len(lines):,} lines of at most {MAX_LINES}")
    for character in "".join(lines):
        if unicodedata.category(character) == "Cc" and character != "\t":
            raise HTTPException(400, f"the text has a control character, U+{ord(character):04X}")
    if all(character.isspace() or unicodedata.category(character) == "Cf" for character in text):
        raise HTTPException(400, "the text is empty")
    return lines


def refuse(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    return JSONResponse({"error": "internal error"}, 500)


def application(translator: Translator) -> Starlette:
    """The page at / and the end point /translate."""
    content = (HERE / "page.html").read_text("utf-8")
    words = {"source": translator.source, "target": translator.target, "model": f"Model: {translator.description}"}
    for name, value in words.items():
        content = content.replace(f"{{{name}}}", html.escape(value))
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"

    async def page(_: Request) -> Response:
        return HTMLResponse(content, headers={"Content-Security-Policy": policy})

    async def translate(request: Request) -> Response:
        refuse_other_sites(request)
        try:
            lines = await asyncio.wait_for(read_lines(request), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the text did not arrive within {BODY_SECONDS} seconds") from None
        client = request.client.host if request.client else ""
        answer = asyncio.create_task(request.app.state.batcher.translate(lines, client))
        left = asyncio.create_task(request.receive())  # the body is read: what comes next is that the client has left
        try:
            await asyncio.wait((answer, left), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ClientDisconnect
            return JSONResponse({"translation": "\n".join(answer.result())})
        finally:
            answer.cancel()
            left.cancel()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.batcher = Batcher(translator)
        worker = asyncio.create_task(app.state.batcher.run())
        yield
        worker.cancel()

    return Starlette(
        routes=[Route("/", page), Route("/translate", translate, methods=["POST"])],
        # no site elsewhere may use the translator by letting its own name point here
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
        # whoever left gets no answer, and the log no traceback
        exception_handlers={HTTPException: refuse, ClientDisconnect: refuse, Exception: refuse},
        lifespan=lifespan,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1 (default: 8000)")
    add_options(parser)
    args = parser.parse_args()
    folder = args.run
    try:
        socket.create_server(("127.0.0.1", args.port)).close()
    except (OSError, OverflowError) as error:
        sys.exit(f"error: cannot listen on port {args.port}: {getattr(error, 'strerror', None) or error}")
    if not (folder / "text.json").is_file():
        folder /= "deploy" if args.quantization is None else f"deploy-{args.quantization}"
        made, checkpoint = folder / "text.json", checkpoint_of(args.run)
        if not made.is_file() or made.stat().st_mtime < checkpoint.stat().st_mtime:
            convert(args.run, folder, args.data, args.quantization)
    app = application(Translator(folder))
    limits = {"limit_concurrency": MAX_CONNECTIONS, "timeout_graceful_shutdown": 30}
    uvicorn.run(app, http=Connection, host="127.0.0.1", port=args.port, access_log=False, **limits)


if __name__ == "__main__":
    main()
