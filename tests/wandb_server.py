"""A W&B server on the loopback interface, as far as `wandb sync` and an online run need one: it keeps what it gets."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class StoredRun:
    """Content of one run, as the client has sent it."""

    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Rows by their offset in the history."""
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)
    """Offsets that were sent twice."""

    def take(self, files: dict[str, Any]) -> None:
        """Stores one request of the file stream."""
        lines = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for offset, line in enumerate(lines["content"], lines["offset"]):
            self.replaced += [offset] if offset in self.history else []
            self.history[offset] = json.loads(line)
        for line in files.get("wandb-summary.json", {}).get("content", []):
            self.summary = json.loads(line)

    def resume_status(self) -> dict[str, Any]:
        """Answer to a client that is about to continue the run."""
        tail = [json.dumps(self.history[n]) for n in sorted(self.history)[-1:]]
        lines = {"historyLineCount": len(self.history), "eventsLineCount": 0, "logLineCount": 0}
        texts = {"historyTail": json.dumps(tail), "eventsTail": "[]", "summaryMetrics": json.dumps(self.summary)}
        return {"id": "run", "tags": [], "wandbConfig": '{"t": 1}', "config": json.dumps(self.config), **lines, **texts}


class WandbServer(ThreadingHTTPServer):
    """Holds `runs` by id."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.runs: dict[str, StoredRun] = {}

    def handle_error(self, *_: object) -> None:
        """Ignores that clients drop connections that they keep open."""

    def answer(self, query: str, values: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL request."""
        owner = {"id": "entity", "name": "me"}
        if "RunResumeStatus" in query:
            stored = self.runs.get(values["name"])
            bucket = stored and {"name": values["name"], "displayName": "x", **stored.resume_status()}
            return {"model": {"id": "project", "name": values["project"], "entity": owner, "bucket": bucket}}
        if "UpsertBucket" in query:
            run = self.runs.setdefault(values["name"], StoredRun())
            run.config = json.loads(values["config"]) if values.get("config") else run.config
            run.names += [values["displayName"]] if values.get("displayName") else []
            project = {"id": "project", "name": values["project"], "entity": owner}
            answer = {"id": "run", "name": values["name"], "displayName": "x", "config": "{}", "project": project}
            answer |= {"description": "", "sweepName": "", "historyLineCount": len(run.history)}
            return {"upsertBucket": {"bucket": answer, "inserted": True}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.address}/{name}"} for name in values["files"]]
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
        if "CreateArtifact" in query:  # "committed": the server has its content, and asks for no files
            sequence = {"id": "sequence", "latestArtifact": {"id": "artifact", "versionIndex": 0}}
            artifact = {"id": "artifact", "state": "COMMITTED", "artifactSequence": sequence, "digest": ""}
            return {"createArtifact": {"artifact": artifact}}
        if "query ArtifactType" in query:
            return {"project": {"artifactType": {"name": "run_table"}, "artifact": None}}
        features = {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}
        viewer = {"id": "user", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer, "serverInfo": features}


class Handler(BaseHTTPRequestHandler):
    """Requests of the client: GraphQL, the file stream, uploads of files."""

    server: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_PUT(self) -> None:
        self._body()
        self._answer({})

    do_GET = do_PUT

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path.endswith("/graphql"):
            request = json.loads(body)
            self._answer({"data": self.server.answer(request["query"], request.get("variables") or {})})
            return
        if self.path.endswith("/file_stream"):
            self.server.runs[self.path.split("/")[-2]].take(json.loads(body).get("files") or {})
        self._answer({"exitcode": None, "limits": {}})

    def _answer(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving() -> Iterator[tuple[str, dict[str, StoredRun]]]:
    """Yields the address of a server and the runs that it holds, by id."""
    server = WandbServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.address, server.runs
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
