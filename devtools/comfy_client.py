"""A small synchronous client for ComfyUI: plain HTTP, and a websocket that follows a prompt to its end."""

from __future__ import annotations

import asyncio
import json
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

Json = dict[str, Any]
TEXT, PREVIEW = 3, 4  # types of binary frames for clients that support preview metadata
ENDINGS = {
    "execution_success": "success",
    "execution_error": "error",
    "execution_interrupted": "interrupted",
}

SMALL_PROMPT: Json = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
    "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
}


class RequestRefused(RuntimeError):
    """An HTTP response of 400 or above, with its `status` and `body`."""

    def __init__(self, path: str, status: int, body: str) -> None:
        super().__init__(f"{path} answered {status}: {_refusal(body)}")
        self.status = status
        self.body = body


@dataclass(frozen=True)
class Event:
    """A message of the server; for a "preview" `image` holds the encoded picture."""

    kind: str
    data: Json
    image: bytes | None = None


@dataclass
class RunResult:
    """How a prompt ended: "success", "error" or "interrupted"; `outputs` are the nodes' UI outputs."""

    prompt_id: str
    status: str
    outputs: dict[str, Json]
    events: list[Event] = field(repr=False)
    error: Json | None = None

    def kinds(self) -> list[str]:
        """The kinds of the events, in order."""
        return [event.kind for event in self.events]

    def of_kind(self, kind: str) -> list[Event]:
        """The events of one kind, in order."""
        return [event for event in self.events if event.kind == kind]


class ComfyClient:
    """Talks to the server at `url` under its own client id."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.client_id = uuid.uuid4().hex

    def get(self, path: str) -> bytes:
        """The body of a GET; a status of 400 or above raises."""
        return self._request(path)

    def get_json(self, path: str) -> Any:
        """The JSON of a GET; NaN and infinities raise, because browsers reject them."""
        return json.loads(self.get(path), parse_constant=_refuse_constant)

    def status(self, path: str) -> int:
        """The HTTP status of a GET."""
        try:
            self.get(path)
        except RequestRefused as refusal:
            return refusal.status
        return 200

    def post(self, path: str, payload: Json) -> Any:
        """The JSON response to a POST of JSON; None if it is empty."""
        body = json.dumps(payload).encode()
        return _parsed(self._request(path, body, "application/json"))

    def object_info(self, node_id: str | None = None) -> Json:
        """The description of one node, or of all."""
        return self.get_json(f"/object_info/{node_id}")[node_id] if node_id else self.get_json("/object_info")

    def queue(self, prompt: Mapping[str, Json]) -> str:
        """Queue an API-format prompt and return its id."""
        return self.post("/prompt", {"prompt": prompt, "client_id": self.client_id})["prompt_id"]

    def interrupt(self) -> None:
        """Stop the running prompt; also allowed inside `on_event`."""
        self.post("/interrupt", {})

    def stop(self, patience: float = 60.0) -> None:
        """Forget what is queued, interrupt what runs, and wait until it has ended: a trainer first saves its LoRA."""
        self.post("/queue", {"clear": True})
        deadline = time.monotonic() + patience
        if self.get_json("/queue")["queue_running"]:
            self.interrupt()
        while self.get_json("/queue")["queue_running"] and time.monotonic() < deadline:
            time.sleep(0.2)

    def free(self) -> None:
        """Unload the models and forget cached results.

        The server does so when it is idle, or after the prompt that it runs next; so that it is done, run a small one.
        """
        self.post("/free", {"unload_models": True, "free_memory": True})
        self.run(SMALL_PROMPT)

    def history(self, prompt_id: str) -> Json:
        """The history entry of a prompt; empty while there is none."""
        return self.get_json(f"/history/{prompt_id}").get(prompt_id, {})

    def view(self, image: Mapping[str, str]) -> bytes:
        """The file behind an image reference of a node's output."""
        return self.get(f"/view?{urllib.parse.urlencode(image)}")

    def upload(self, file: Path, subfolder: str = "") -> Json:
        """Upload an image to the input folder and return its reference."""
        boundary = uuid.uuid4().hex
        fields = {
            f'image"; filename="{file.name}': file.read_bytes(),
            "subfolder": subfolder.encode(),
            "overwrite": b"true",
        }
        body = b""
        for name, content in fields.items():
            head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
            body += head.encode() + content + b"\r\n"
        body += f"--{boundary}--\r\n".encode()
        return _parsed(self._request("/upload/image", body, f"multipart/form-data; boundary={boundary}"))

    def run(
        self,
        prompt: Mapping[str, Json],
        on_event: Callable[[Event], None] | None = None,
        timeout: float = 300.0,
    ) -> RunResult:
        """Queue a prompt and follow it to its end; a run longer than `timeout` is interrupted and raises."""
        return asyncio.run(self._run(prompt, on_event or (lambda event: None), timeout))

    async def _run(self, prompt: Mapping[str, Json], on_event: Callable[[Event], None], timeout: float) -> RunResult:
        events: list[Event] = []
        address = f"{self.url}/ws?clientId={self.client_id}"
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(address, max_msg_size=0) as socket:
                flags = {"supports_preview_metadata": True}
                await socket.send_json({"type": "feature_flags", "data": flags})
                prompt_id = self.queue(prompt)
                try:
                    await asyncio.wait_for(_follow(socket, prompt_id, events, on_event), timeout)
                except (TimeoutError, asyncio.TimeoutError):
                    self.interrupt()
                    raise TimeoutError(f"The prompt had not ended after {timeout:.0f} s.") from None
        ending = next(event for event in reversed(events) if event.kind in ENDINGS)
        return RunResult(
            prompt_id=prompt_id,
            status=ENDINGS[ending.kind],
            outputs=self.history(prompt_id).get("outputs", {}),
            events=events,
            error=ending.data if ending.kind == "execution_error" else None,
        )

    def _request(self, path: str, body: bytes | None = None, kind: str = "") -> bytes:
        quoted = urllib.parse.quote(path, safe="/?&=%+:,")
        request = urllib.request.Request(self.url + quoted, data=body, headers={"Content-Type": kind} if kind else {})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.read()
        except urllib.error.HTTPError as error:
            raise RequestRefused(path, error.code, error.read().decode(errors="replace")) from None


async def _follow(
    socket: aiohttp.ClientWebSocketResponse,
    prompt_id: str,
    events: list[Event],
    on_event: Callable[[Event], None],
) -> None:
    """Collect the events of a prompt until the server reports that it is done and its history is written."""
    async for message in socket:
        if message.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
            continue
        event = decoded(message.data)
        if event is None or event.data.get("prompt_id", prompt_id) != prompt_id:
            continue
        events.append(event)
        on_event(event)
        if event.kind == "executing" and event.data.get("node") is None:
            return
    raise ConnectionError("The server closed the connection while a prompt was running.")


def decoded(frame: str | bytes) -> Event | None:
    """A websocket frame as an event; binary frames of unknown type are None."""
    if isinstance(frame, str):
        message = json.loads(frame, parse_constant=_refuse_constant)
        return Event(message["type"], message.get("data") or {})
    kind, length = struct.unpack_from(">II", frame)
    head, rest = frame[8 : 8 + length], frame[8 + length :]
    if kind == PREVIEW:
        return Event("preview", json.loads(head), rest)
    if kind == TEXT:
        return Event("text", {"node": head.decode(), "text": rest.decode()})
    return None


def with_overrides(prompt: Mapping[str, Json], overrides: Mapping[str, Json]) -> dict[str, Json]:
    """A copy of an API prompt with ``{node title: {input: value}}`` written into it."""
    changed = json.loads(json.dumps(prompt))
    for title, inputs in overrides.items():
        changed[node_titled(prompt, title)]["inputs"].update(inputs)
    return changed


def node_titled(prompt: Mapping[str, Json], title: str) -> str:
    """The id of the node with that title; none or several is an error."""
    titles = titles_of(prompt)
    found = [key for key, own in titles.items() if own == title]
    if len(found) != 1:
        count = "Several nodes are" if found else "No node is"
        raise LookupError(f"{count} titled {title!r}; the titles are {sorted(titles.values())}.")
    return found[0]


def titles_of(prompt: Mapping[str, Json]) -> dict[str, str]:
    """The titles of a prompt's nodes by their ids; an untitled node is listed under its class."""
    return {key: node.get("_meta", {}).get("title") or node["class_type"] for key, node in prompt.items()}


def load_prompt(file: Path) -> dict[str, Json]:
    """Read an API-format workflow file."""
    return json.loads(file.read_text(encoding="utf-8"))


def _refusal(body: str) -> str:
    """Why a request was refused; for an invalid prompt, which inputs of which nodes are wrong."""
    try:
        answer = json.loads(body)
        errors = [
            f"{node['class_type']} {key}: {error['message']} ({error['details']})"
            for key, node in (answer.get("node_errors") or {}).items()
            for error in node["errors"]
        ]
        return "; ".join(errors) or f"{answer['error']['message']} ({answer['error']['details']})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return body.strip() or "nothing"


def _parsed(body: bytes) -> Any:
    return json.loads(body) if body else None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not valid JSON")
