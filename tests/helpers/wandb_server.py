"""A minimal W&B server for runs: login, init, resume, history, summary, files, finish.

It answers by the name of the GraphQL operation. The received data is in `WandbServer.runs`.
"""

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "team"


@dataclass
class ReceivedRun:
    project: str
    fields: dict[str, Any] = field(default_factory=dict)  # last values from UpsertBucket
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    streams: dict[str, list[str]] = field(default_factory=dict)  # lines by file, e.g. history
    events: list[str] = field(default_factory=list)  # "preempting", "exit 0", in order
    overwritten: int = 0  # number of lines that replaced earlier lines

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.streams.get("wandb-history.jsonl", [])]


class WandbServer:
    """A server for tests: `with WandbServer() as server:` listens on `server.url` (loopback)."""

    def __init__(self) -> None:
        self.runs: dict[str, ReceivedRun] = {}
        self.files: dict[str, bytes] = {}
        self.views: dict[str, dict[str, Any]] = {}
        self.unknown: list[str] = []  # requested operations that have no answer here
        self.down = False  # if true, every request is answered with 503
        self._lock = threading.Lock()
        self._http = _Listener(("127.0.0.1", 0), type("", (_Handler,), {"server_": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "WandbServer":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that make a client log online to this server."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": "0" * 40,
            "WANDB_MODE": "online",
            "WANDB_ENTITY": ENTITY,
            "WANDB_ERROR_REPORTING": "false",
        }

    def query(self, text: str, variables: dict[str, Any]) -> dict[str, Any]:
        words = text.replace("(", " ").split()
        answer = getattr(self, f"_{words[1]}", None)
        with self._lock:
            if answer is None:
                self.unknown.append(words[1])
                return {"errors": [{"message": f"no answer to {words[1]}"}]}
            return {"data": answer(variables.get("input", variables))}

    def stream(self, name: str, body: dict[str, Any]) -> None:
        """Stores lines of a run's files. Each chunk has the offset where it goes."""
        with self._lock:
            run = self.runs[name]
            for file, chunk in (body.get("files") or {}).items():
                if file == "wandb-summary.json":
                    run.summary = json.loads(chunk["content"][-1])
                    continue
                lines = run.streams.setdefault(file, [])
                start, content = chunk["offset"], chunk["content"]
                run.overwritten += len(lines[start : start + len(content)])
                lines[start : start + len(content)] = content
            if body.get("preempting"):
                run.events.append("preempting")
            if body.get("complete"):
                run.events.append(f"exit {body.get('exitcode')}")

    # Answers by operation

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        return {
            "viewer": {
                "id": "1",
                "entity": ENTITY,
                "username": ENTITY,
                "flags": "{}",
                "teams": teams,
                "email": "",
                "admin": False,
            }
        }

    def _ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _OrganizationCoreWeaveOrganizationID(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def _RunResumeStatus(self, v: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(v["name"])
        return {"model": {"id": "1", "name": v["project"], "bucket": run and self._bucket(v, run)}}

    def _UpsertBucket(self, v: dict[str, Any]) -> dict[str, Any]:
        inserted = v["name"] not in self.runs
        run = self.runs.setdefault(v["name"], ReceivedRun(v["project"]))
        run.fields |= {k: value for k, value in v.items() if value is not None}
        run.config |= json.loads(v.get("config") or "{}")
        run.summary |= json.loads(v.get("summaryMetrics") or "{}")
        return {"upsertBucket": {"bucket": self._bucket(v, run), "inserted": inserted}}

    def _CreateRunFiles(self, v: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": f, "uploadUrl": f"{self.url}/storage/{v['run']}/{f}"} for f in v["files"]]
        return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": files}}

    def _ArtifactType(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}  # not found, so that its name is free

    def _CreateArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
        """Answers that the artifact exists, so that nothing is sent. Run files have the tables."""
        latest = {"latestArtifact": {"id": "1", "versionIndex": 0}}
        artifact = {"id": "1", "state": "COMMITTED", "artifactSequence": latest}
        return {"createArtifact": {"artifact": artifact}}

    def _UpsertView2(self, v: dict[str, Any]) -> dict[str, Any]:
        self.views[v["name"]] = v
        return {
            "upsertView": {"view": {"id": f"id-{v['name']}", "name": v["name"]}, "inserted": True}
        }

    def _bucket(self, v: dict[str, Any], run: ReceivedRun) -> dict[str, Any]:
        history = run.streams.get("wandb-history.jsonl", [])
        events = run.streams.get("wandb-events.jsonl", [])
        return {
            "id": v["name"],
            "name": v["name"],
            "displayName": run.fields.get("displayName", v["name"]),
            "description": None,
            "notes": None,
            "group": run.fields.get("groupName"),
            "jobType": run.fields.get("jobType"),
            "tags": run.fields.get("tags", []),
            "sweepName": None,
            "config": json.dumps(run.config),
            "wandbConfig": json.dumps({"t": 1}),
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(history),
            "historyTail": json.dumps(history[-1:]),
            "eventsLineCount": len(events),
            "eventsTail": json.dumps(events[-1:]),
            "logLineCount": len(run.streams.get("output.log", [])),
            "project": {"id": "1", "name": v["project"], "entity": {"id": "1", "name": ENTITY}},
        }


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores errors: a killed client resets its connections."""


class _Handler(BaseHTTPRequestHandler):
    server_: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.startswith("/control/"):  # for tests, from any process
            self.server_.down = self.path.endswith("/down")
            return self._answer({})
        if self.server_.down:
            return self._answer({"error": "down"}, 503)
        if self.path == "/graphql":
            asked = json.loads(body)
            return self._answer(self.server_.query(asked["query"], asked.get("variables") or {}))
        if self.path.endswith("/file_stream"):
            self.server_.stream(self.path.split("/")[-2], json.loads(body))
        return self._answer({})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server_.down:
            return self._answer({"error": "down"}, 503)
        self.server_.files[self.path.removeprefix("/storage/")] = body
        return self._answer({})

    def do_GET(self) -> None:
        self._answer({"error": "not found"}, 404)

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *_: object) -> None:
        pass
