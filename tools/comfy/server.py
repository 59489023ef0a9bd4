"""ComfyUI server with this pack, and a client for its API; used by the demo and the tests."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

import aiohttp

PACK = Path(__file__).resolve().parents[2]
PACK_NAME = "ComfyUI-TurboTalk"  # the folder's name in custom_nodes
START_SECONDS = 180
STOP_SECONDS = 10
LOG_LINES = 40  # of a server that failed
TEXT, PREVIEW_WITH_METADATA = 3, 4  # ComfyUI's binary messages with a node's text and picture

Event = dict[str, Any]


class ServerFailed(Exception):
    """Error: the server did not start, or ended."""


class PromptRefused(Exception):
    """Error: the server refused a prompt, or a part of it, before running it.

    Attributes:
        node_errors: the server's reasons, by node id.
    """

    def __init__(self, status: int, answer: dict[str, Any]) -> None:
        """Build the message from the server's reasons.

        Args:
            status: HTTP status.
            answer: the server's JSON.
        """
        self.node_errors: dict[str, Any] = answer.get("node_errors", {})
        reasons = [
            f"{node['class_type']}: {error['message']} ({error['details']})"
            for node in self.node_errors.values()
            for error in node["errors"]
        ]
        super().__init__(f"status {status}: {'; '.join(reasons) or answer.get('error')}")


class PromptFailed(Exception):
    """Error: a prompt ended with an error or an interruption.

    Attributes:
        event: the server's last message about it.
    """

    def __init__(self, event: Event) -> None:
        """Build the message from the node's type and its error."""
        self.event = event
        data = event["data"]
        super().__init__(
            f"{event['type']} in {data.get('node_type')}: {data.get('exception_message', '')}"
        )


class ComfyServer:
    """ComfyUI on this machine's CPU, running inside a ``with`` block."""

    def __init__(self, host: Path, base: Path) -> None:
        """Choose a free port and build the command.

        Args:
            host: ComfyUI's folder.
            base: folder for its models, inputs, outputs and log; created if missing.
        """
        self.base = base
        self.log = base / "server.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self._command = [
            sys.executable, str(host / "main.py"), "--cpu", "--port", str(port),
            "--base-directory", str(base), "--database-url", "sqlite:///:memory:",
            "--disable-auto-launch", "--disable-api-nodes",
        ]  # fmt: skip

    def __enter__(self) -> ComfyServer:
        """Start the server and wait until it answers.

        Returns:
            This server.

        Raises:
            ServerFailed: The server ended, or did not answer in time.
        """
        for name in ("custom_nodes", "models", "input", "output", "temp"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        _put_pack(self.base / "custom_nodes" / PACK_NAME)
        with self.log.open("w") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd=self.base)
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the server."""
        self._stop()

    def kill(self) -> None:
        """Kill the server at once, like a power cut."""
        self._process.kill()

    def _wait(self) -> None:
        host, port = self.address.split(":")
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerFailed(f"ComfyUI ended by itself; its log says:\n{self._read_log()}")
            try:
                socket.create_connection((host, int(port)), timeout=1).close()
            except OSError:
                time.sleep(0.2)
            else:
                return
        raise ServerFailed(f"ComfyUI did not answer; its log says:\n{self._read_log()}")

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read_log(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Result of a successful prompt.

    Attributes:
        outputs: outputs in the history, by node id.
        cached: ids of the nodes that did not run because their result was cached.
    """

    outputs: dict[str, Any]
    cached: frozenset[str]


class ComfyClient:
    """Client of a server's API, for use inside ``async with``."""

    def __init__(self, address: str) -> None:
        """Store the address.

        Args:
            address: host:port.
        """
        self._id = uuid4().hex
        self._address = address

    async def __aenter__(self) -> ComfyClient:
        """Connect."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
        self._http = aiohttp.ClientSession(f"http://{self._address}", timeout=timeout)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Disconnect."""
        await self._http.close()

    async def read(self, path: str, **parameters: str) -> bytes:
        """Fetch a file."""
        async with self._http.get(path, params=parameters) as response:
            response.raise_for_status()
            return await response.read()

    async def get(self, path: str) -> Any:
        """Fetch JSON."""
        return json.loads(await self.read(path))

    async def upload(self, path: Path) -> str:
        """Upload a picture or a sound to the server's input folder.

        Args:
            path: the file; its name is kept.

        Returns:
            The name for LoadImage or LoadAudio.
        """
        form = aiohttp.FormData({"overwrite": "true"})
        form.add_field("image", path.read_bytes(), filename=path.name)
        async with self._http.post("/upload/image", data=form) as response:
            response.raise_for_status()
            return (await response.json())["name"]

    async def view(self, file: dict[str, str]) -> bytes:
        """Fetch a file that is listed in a history."""
        return await self.read(
            "/view", **{key: file[key] for key in ("filename", "subfolder", "type")}
        )

    async def interrupt(self) -> None:
        """Press the stop button."""
        async with self._http.post("/interrupt") as response:
            response.raise_for_status()

    async def run(
        self, prompt: dict[str, Any], on_event: Callable[[Event], object] = lambda _event: None
    ) -> Run:
        """Queue a prompt and wait for its end.

        Args:
            prompt: a workflow in API format.
            on_event: called with each message; pictures come as {"type": "preview", "data":
                {"node": …, "bytes": …}}, texts as {"type": "text", "data": {"node": …, "text": …}}.

        Returns:
            The outputs.

        Raises:
            PromptRefused: The server refused the prompt before running it.
            PromptFailed: The prompt failed while running.
        """
        cached: frozenset[str] = frozenset()
        async with self._http.ws_connect("/ws", params={"clientId": self._id}) as socket_:
            features = {"supports_preview_metadata": True}
            await socket_.send_json({"type": "feature_flags", "data": features})
            prompt_id = await self._queue(prompt)
            async for message in socket_:
                event = _read_message(message.data)
                if event["data"].get("prompt_id", prompt_id) != prompt_id:
                    continue
                on_event(event)
                if event["type"] == "execution_cached":
                    cached = frozenset(event["data"]["nodes"])
                if event["type"] in ("execution_error", "execution_interrupted"):
                    raise PromptFailed(event)
                if event["type"] == "execution_success":
                    history = await self._wait_for_history(prompt_id)
                    return Run(outputs=history["outputs"], cached=cached)
        raise ServerFailed("ComfyUI closed the connection")

    async def _queue(self, prompt: dict[str, Any]) -> str:
        body = {"prompt": prompt, "client_id": self._id}
        async with self._http.post("/prompt", json=body) as response:
            answer = await response.json()
            # an accepted prompt may still have a refused output
            if response.status != 200 or answer["node_errors"]:
                raise PromptRefused(response.status, answer)
            return answer["prompt_id"]

    async def _wait_for_history(self, prompt_id: str) -> dict[str, Any]:
        while True:  # the server writes it just after the last message
            history = await self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            await asyncio.sleep(0.05)


def _read_message(data: str | bytes) -> Event:
    if isinstance(data, str):
        return json.loads(data)
    kind = int.from_bytes(data[:4], "big")
    if kind not in (TEXT, PREVIEW_WITH_METADATA):
        return {"type": f"binary {kind}", "data": {}}
    stop = 8 + int.from_bytes(data[4:8], "big")
    head, body = data[8:stop], data[stop:]
    if kind == TEXT:
        return {"type": "text", "data": {"node": head.decode(), "text": body.decode()}}
    return {"type": "preview", "data": {"node": json.loads(head)["node_id"], "bytes": body}}


def _put_pack(place: Path) -> None:
    if place.is_symlink():
        place.unlink()
    elif place.exists():  # a copy may be out of date
        shutil.rmtree(place)
    try:
        place.symlink_to(PACK, target_is_directory=True)
    except OSError:  # Windows without permission to create links
        shutil.copytree(PACK, place, ignore=shutil.ignore_patterns(".*", "out"))
