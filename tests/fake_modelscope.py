"""A small ModelScope that serves one model and accepts uploads, and fails on request.

The library asks a domain by https. Here it asks http://modelscope.test, and this server is the proxy for it. What it
asks for and reads is known from its source (modelscope 1.37.1, hub/api.py, snapshot_download.py, file_download.py).
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

DOMAIN = "modelscope.test"
TOKEN = "ms-marker0token0that0must0show0up0nowhere"


class FakeModelScope:
    """The server.

    `models`: id -> revision -> path -> content, what is there to download; `refused`: ids of private models.
    `files`, `repositories`, `requests` and `trouble` are those of `FakeHub`: path -> uploaded content, ids that were
    created, paths of all requests, and part of a path -> failures of its next requests (an HTTP status, or "cut").
    """

    def __init__(self):
        self.models = {}
        self.refused = set()
        self.files = {}
        self.repositories = []
        self.requests = []
        self.trouble = {}
        self.stored = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.proxy = f"http://127.0.0.1:{self.server.server_port}"
        self.url = f"http://{DOMAIN}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def downloads(self):
        """The paths of the files that were downloaded."""
        queries = [parse_qs(urlsplit(path).query) for path in self.requests]
        return sorted(query["FilePath"][0] for query in queries if "FilePath" in query)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def send(self, body, status=200, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self, data=None, status=200, message=""):
        """Sends `data` in the envelope of every answer."""
        content = {"Code": status, "Success": status == 200, "Message": message, "Data": data, "RequestId": "0"}
        self.send(json.dumps(content).encode(), status)

    def fails(self):
        """Records the request; sends a failure if one is due, and returns whether it did."""
        self.hub.requests.append(self.path)
        for part, waiting in self.hub.trouble.items():
            if part in self.path and waiting:
                kind = waiting.pop(0)
                if kind == "cut":
                    self.close_connection = True
                    self.connection.close()
                else:
                    self.answer(status=kind, message="the fake was told to fail")
                return True
        return False

    def logged_in(self):
        return f"m_session_id={TOKEN}" in (self.headers.get("Cookie") or "")

    def words(self):
        """The parts of the path after /api/v1, and the query."""
        place = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(place.query).items()}
        return place.path.removeprefix("/api/v1/").split("/"), query

    def do_GET(self):
        if self.fails():
            return
        (_, owner, *rest), query = self.words()
        if owner == "internalAccelerationInfo":  # the library asks whether it runs in a cloud of the company
            self.answer({"InternalRegionQueryAddress": ""})
            return
        name, *rest = rest
        model = f"{owner}/{name}"
        if model in self.hub.refused and not self.logged_in():
            self.answer(status=403, message="no access")
        elif model not in {*self.hub.models, *self.hub.repositories}:
            self.answer(status=404, message="not found")
        elif not rest:
            self.answer({"Name": name})
        elif rest == ["revisions"]:
            revisions = [{"Revision": revision, "CreatedAt": 0} for revision in self.hub.models[model]]
            branches = [each for each in revisions if each["Revision"] == "master"]
            tags = [each for each in revisions if each["Revision"] != "master"]
            self.answer({"RevisionMap": {"Branches": branches, "Tags": tags}})
        else:
            files = self.hub.models[model][query["Revision"]]
            if rest == ["repo", "files"]:
                self.answer({"Files": [describe(path, content) for path, content in files.items()]})
            else:
                self.send(files[query["FilePath"]], kind="application/octet-stream")

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.fails():
            self.hub.stored[self.path.rsplit("/", 1)[1]] = body
            self.answer()

    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        if self.fails():
            return
        words, _ = self.words()
        if words == ["login"]:
            if content["AccessToken"] == TOKEN:
                self.answer({"Username": "somebody", "AccessToken": "for git", "Email": ""})
            else:
                self.answer(status=400, message=f"the token {content['AccessToken']} is not valid")
        elif not self.logged_in():
            self.answer(status=403, message="log in")
        elif words == ["models"]:
            self.hub.repositories.append(f"{content['Path']}/{content['Name']}")
            self.answer()
        elif words[-1] == "batch":
            for each in content["objects"]:
                each["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
            self.answer({"objects": content["objects"]})
        else:  # a commit
            for action in content["actions"]:
                is_lfs = action["type"] == "lfs"
                data = self.hub.stored[action["sha256"]] if is_lfs else base64.b64decode(action["content"])
                self.hub.files[action["path"]] = data
            self.answer({"oid": "0" * 40})


def describe(path, content):
    """A file in the list of a model's files."""
    digest = hashlib.sha256(content).hexdigest()
    name = path.rsplit("/", 1)[-1]
    return {"Path": path, "Name": name, "Type": "blob", "Size": len(content), "Sha256": digest, "Revision": digest[:8]}
