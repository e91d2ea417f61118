"""As much of a wandb server as a run needs, until it is gone."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_VIEWER = {"id": "u", "entity": "us", "username": "me", "email": "", "flags": "{}"}
_BUCKET = {
    "id": "b", "displayName": "run", "config": "{}", "historyLineCount": 0,
    "project": {"id": "p", "name": "test", "entity": {"id": "e", "name": "us"}},
}  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    """Of HTTP 1.0, whose connections end with their answer."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        answer = _answer(json.loads(body)) if self.path.endswith("/graphql") else {}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_PUT = do_POST

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {
        "Viewer": {"viewer": {**_VIEWER, "teams": {"edges": []}}},
        "RunResumeStatus": {"model": {"bucket": None}},
        "UpsertBucket": {
            "upsertBucket": {
                "bucket": {**_BUCKET, "name": (asked.get("variables") or {}).get("name")},
                "inserted": True,
            }
        },
        "CreateRunFiles": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}},
        "ArtifactType": {"project": None},
    }
    name = asked.get("operationName")
    if name not in known:
        return {"data": None, "errors": [{"message": f"{name} is not known here"}]}
    return {"data": known[name]}


class WandbServer:
    """Serves at `address` until `vanish`."""

    def __init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.asked = []  # type: ignore[attr-defined]
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def vanish(self) -> None:
        """Nobody listens any more."""
        self._server.shutdown()
        self._server.server_close()

    def was_sent_metrics(self) -> bool:
        """Or a summary of them."""
        asked: list[str] = self._server.asked  # type: ignore[attr-defined]
        return any(path.endswith("/file_stream") for path in asked)
