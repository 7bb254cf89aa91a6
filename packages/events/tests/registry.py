"""A schema registry for tests: a real server that keeps schemas, and can be slow, wrong or away."""

import json
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Registry:
    """What is known of it.

    Attributes:
        url: where it is.
        schemas: by id from 1 on, as they were registered.
        subjects: of each the ids of its versions.
        asked: the paths of all that was looked up.
        authorizations: what it was shown.
        wants: the header that it must be shown, None for any.
        fails: a status that it answers every question with; 0 closes the connection.
        waits: it answers nothing until this is set.
        hides: ids that it says it has none of.
        says: what it answers instead, to every question.
        deleted: subjects and their versions that it tells only to those who ask for what was deleted, too.
        drips: it answers byte by byte, and never to the end.
        dripping: how many such answers it is giving.
    """

    url: str = ""
    schemas: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    subjects: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    asked: list[str] = field(default_factory=list[str])
    authorizations: list[str | None] = field(default_factory=list[str | None])
    wants: str | None = None
    fails: int | None = None
    waits: threading.Event = field(default_factory=threading.Event)
    hides: set[int] = field(default_factory=set[int])
    says: tuple[int, Any] | None = None
    deleted: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])
    drips: bool = False
    dripping: int = 0

    def add(self, subject: str, schema: dict[str, Any]) -> int:
        """Register a schema, and return its id."""
        found = next((id_ for id_, known in self.schemas.items() if known == schema), None)
        if found is None:
            found = len(self.schemas) + 1
            self.schemas[found] = schema
        if found not in self.subjects.setdefault(subject, []):
            self.subjects[subject].append(found)
        return found

    def answer(self, method: str, path: str, body: bytes, query: str = "") -> tuple[int, Any]:
        """What it says: a status, and JSON."""
        if method == "POST" and (match := re.fullmatch(r"/subjects/([^/]+)(/versions)?", path)):
            subject = unquote(match[1])
            schema = {
                name: value
                for name, value in json.loads(body).items()
                if value and name in {"schema", "schemaType", "references"}
            }
            id_ = self.add(subject, schema)
            return 200, {"id": id_, "subject": subject, "version": self.subjects[subject].index(id_) + 1, **schema}
        if match := re.fullmatch(r"/schemas/ids/(\d+)", path):
            id_ = int(match[1])
            if id_ in self.schemas and id_ not in self.hides:
                return 200, self.schemas[id_]
            return 404, {"error_code": 40403, "message": "Schema not found"}
        if match := re.fullmatch(r"/subjects/([^/]+)/versions/(\d+)", path):
            ids = self.subjects.get(unquote(match[1]), [])
            gone = (unquote(match[1]), int(match[2])) in self.deleted and "deleted=true" not in query.split("&")
            if 0 < int(match[2]) <= len(ids) and not gone:
                id_ = ids[int(match[2]) - 1]
                return 200, {"subject": match[1], "version": int(match[2]), "id": id_, **self.schemas[id_]}
            return 404, {"error_code": 40402, "message": "Version not found"}
        if path == "/config":
            return 200, {"compatibilityLevel": "BACKWARD"}
        return 404, {"error_code": 404, "message": "HTTP 404 Not Found"}


@contextmanager
def registry(tls: ssl.SSLContext | None = None) -> Iterator[Registry]:
    """Have one run."""
    this = Registry()
    this.waits.set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            path, query = urlsplit(self.path)[2:4]
            if self.command == "GET":
                this.asked.append(path)
                this.authorizations.append(self.headers.get("authorization"))
            this.waits.wait(60)
            status, told = this.says or this.answer(self.command, path, body, query)
            if this.wants is not None and self.headers.get("authorization") != this.wants:
                status, told = 401, {"error_code": 401, "message": "Unauthorized"}
            if this.fails == 0:
                self.close_connection = True
                return
            if this.fails is not None:
                status, told = this.fails, {"error_code": 50001, "message": "not now"}
            text = json.dumps(told).encode()
            if this.drips:
                self.drip()
                return
            self.send_response(status)
            self.send_header("content-type", "application/vnd.schemaregistry.v1+json")
            self.send_header("content-length", str(len(text)))
            if status == 302:
                self.send_header("location", f"{this.url}/elsewhere")
            self.end_headers()
            self.wfile.write(text)

        def drip(self) -> None:
            """A header without an end, until its reader leaves."""
            this.dripping += 1
            self.close_connection = True
            try:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nx-slow: ")
                while this.drips:
                    self.wfile.write(b"x")
                    threading.Event().wait(0.02)
            except OSError:
                pass
            finally:
                this.dripping -= 1

        do_POST = do_GET  # noqa: N815  the server's name for it

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    this.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield this
    finally:
        this.waits.set()
        server.shutdown()
        server.server_close()
        thread.join()
