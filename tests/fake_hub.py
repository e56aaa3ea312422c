"""A small Hugging Face hub on 127.0.0.1 that accepts uploads and fails on request."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_marker0token0that0must0show0up0nowhere"


class FakeHub:
    """The server. `files`: path -> committed content; `trouble`: part of a path -> failures of its next requests.

    A failure is an HTTP status, or "cut" to close the connection.
    """

    def __init__(self):
        self.files = {}
        self.repositories = []
        self.requests = []
        self.trouble = {}
        self.stored = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def answer(self, content, status=200):
        """Sends `content` as JSON."""
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def fails(self):
        """Records the request; sends a failure if one is due or the token is wrong, and returns whether it did."""
        self.hub.requests.append(self.path)
        for part, waiting in self.hub.trouble.items():
            if part in self.path and waiting:
                kind = waiting.pop(0)
                if kind == "cut":
                    self.close_connection = True
                    self.connection.close()
                else:
                    self.answer({"error": "the fake hub was told to fail"}, kind)
                return True
        if "/lfs/" not in self.path and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
            return True
        return False

    def do_GET(self):
        if not self.fails():
            self.answer({"name": "somebody", "type": "user"} if self.path == "/api/whoami-v2" else {}, 200)

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.fails():
            self.hub.stored[self.path.rsplit("/", 1)[1]] = body
            self.answer({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.fails():
            return
        if self.path == "/api/repos/create":
            content = json.loads(body)
            name = f"{content.get('organization') or 'somebody'}/{content['name']}"
            self.hub.repositories.append(name)
            self.answer({"url": f"{self.hub.url}/{name}", "name": name})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self.answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}", "header": {}}}
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.hub.files[value["path"]] = self.hub.stored[value["oid"]]
            address = f"{self.hub.url}/{self.path.split('/api/models/')[1].split('/commit/')[0]}/commit/{'0' * 40}"
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": address})
        else:
            self.answer({})
