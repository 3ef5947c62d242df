"""As much of an OpenAI server as ``bench peers`` asks. Arguments: file for the address, what is wrong with it.

none; late: the address comes, and no answer; http: each second answer is a 503; few: a token is missing.
"""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_WRONG = sys.argv[2]
_LOCK = threading.Lock()
_seen = 0


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        global _seen
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with _LOCK:
            _seen += 1
            number = _seen
        if _WRONG == "late":
            time.sleep(600)
        if _WRONG == "http" and number % 2 == 0:
            self.send_error(503, "busy")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for i in range(body["max_tokens"] - (_WRONG == "few")):
            self._event({"choices": [{"text": "", "token_ids": [body["prompt"][0] + i]}]})
            time.sleep(0.002)
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: dict[str, object]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Path(sys.argv[1]).write_text(f"http://127.0.0.1:{server.server_address[1]}")
    server.serve_forever()


if __name__ == "__main__":
    main()
