#!/usr/bin/env python3
"""Records the requests of an SDK.

usage: capture.py OUT.ndjson REQUESTS.ndjson COMMAND...

Runs COMMAND with CAPTURE_URL in its environment, the URL of a local HTTP server that accepts every POST
and PUT. Writes each request as a line {method, path, body} to REQUESTS. Writes each event as a line to
OUT: the body, or the items of its "batch", byte for byte. Events that are not JSON (NaN) go to a file
with the suffix .not-json.ndjson instead of .ndjson.
"""

import gzip
import json
import os
import pathlib
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BLANKS = " \t\r\n"


def blanks(text, at):
    """The position of the next character that is not blank."""
    while text[at] in BLANKS:
        at += 1
    return at


def members(text):
    """The members of an object or a list: the key (None in a list) and the unchanged text."""
    decoder = json.JSONDecoder()
    in_object = text[0] == "{"
    at = blanks(text, 1)
    while text[at] not in "}]":
        key = None
        if in_object:
            key, at = decoder.raw_decode(text, at)
            at = blanks(text, at)
            assert text[at] == ":"
            at = blanks(text, at + 1)
        _, end = decoder.raw_decode(text, at)
        yield key, text[at:end]
        at = blanks(text, end)
        if text[at] == ",":
            at = blanks(text, at + 1)


def events(body):
    """The events in the body of a request."""
    body = body.strip(BLANKS)
    if body.startswith("{"):
        for key, value in members(body):
            if key == "batch" and value.startswith("["):
                return [event for _, event in members(value)]
    return [body]


def no_constant(name):
    raise ValueError(name)


def is_json(text):
    """Python's parser accepts NaN and Infinity, which are not JSON."""
    try:
        json.loads(text, parse_constant=no_constant)
    except ValueError:
        return False
    return True


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def take(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        with self.server.lock:
            self.server.requests.append((self.command, self.path, body.decode("utf-8")))
        answer = b'{"success":true}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_PUT = take

    def log_message(self, *_):
        pass


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__.strip())
    out, log, command = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.lock, server.requests = threading.Lock(), []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    # With a fixed zone, times without a zone are the same on every machine.
    environment = {**os.environ, "CAPTURE_URL": url, "NO_PROXY": "127.0.0.1", "TZ": "UTC"}
    subprocess.run(command, env=environment, check=True, timeout=120)
    server.shutdown()

    with log.open("w", encoding="utf-8") as file:
        for method, path, body in server.requests:
            file.write(json.dumps({"method": method, "path": path, "body": body}, ensure_ascii=False) + "\n")
    lines, others = [], []
    for _, _, body in server.requests:
        for event in events(body):
            assert event and "\n" not in event, "an event takes exactly one line"
            (lines if is_json(event) else others).append(event + "\n")
    if not lines:
        sys.exit(f"{out.name}: nothing was sent")
    out.write_text("".join(lines), encoding="utf-8")
    odd = out.with_suffix(".not-json.ndjson")
    odd.unlink(missing_ok=True)
    if others:
        odd.write_text("".join(others), encoding="utf-8")
    print(f"{out.name}: {len(lines)} lines" + (f", {odd.name}: {len(others)}" if others else ""))


if __name__ == "__main__":
    main()
