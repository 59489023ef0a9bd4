"""Demo: a shipped portrait says a shipped sentence, in a real ComfyUI, over its API.

The program starts the host on the CPU with separate folders, uploads the two files, queues the API
workflow, shows a progress bar, saves ``out/demo.mp4``, and prints the time of each part.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from tqdm import tqdm

from tools.comfy.download import CACHE, find_host
from tools.comfy.server import PACK, ComfyClient, ComfyServer, Event, PromptFailed, PromptRefused

WORKFLOW = PACK / "workflows" / "api" / "first_video.json"
PORTRAIT = PACK / "assets" / "portrait.png"
SPEECH = PACK / "assets" / "speech.wav"
RESULT = PACK / "out" / "demo.mp4"


class Follower:
    """Observer of the server's messages: updates a progress bar and measures time per node."""

    def __init__(self, titles: dict[str, str], bar: tqdm) -> None:
        """Start the clock.

        Args:
            titles: titles of the nodes, by id.
            bar: the progress bar to update.
        """
        self.seconds: dict[str, float] = {}
        self._titles = titles
        self._bar = bar
        self._node: str | None = None
        self._since = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Process one message."""
        data = event["data"]
        if event["type"] in ("executing", "execution_success"):
            now = time.monotonic()
            if self._node is not None:
                self.seconds[self._titles[self._node]] = now - self._since
            self._node, self._since = data.get("node"), now
            if self._node is not None:
                self._bar.set_description(self._titles[self._node])
        elif event["type"] == "progress":
            if self._bar.total != data["max"]:
                self._bar.reset(total=data["max"])
            self._bar.update(data["value"] - self._bar.n)


async def _talk(address: str, bar: tqdm) -> tuple[bytes, dict[str, float]]:
    prompt = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    nodes = {node["class_type"]: (node_id, node) for node_id, node in prompt.items()}
    async with ComfyClient(address) as client:
        nodes["LoadImage"][1]["inputs"]["image"] = await client.upload(PORTRAIT)
        nodes["LoadAudio"][1]["inputs"]["audio"] = await client.upload(SPEECH)
        follower = Follower({key: node["_meta"]["title"] for key, node in prompt.items()}, bar)
        run = await client.run(prompt, follower)
        save_id, _ = nodes["SaveVideo"]
        (file,) = run.outputs[save_id]["images"]
        return await client.view(file), follower.seconds


def main() -> None:
    """Make the video.

    Raises:
        SystemExit: The host refused or failed; the message has the reason and the path of its log.
    """
    started = time.monotonic()
    host = find_host()
    found = time.monotonic()
    with ComfyServer(host, CACHE / "demo") as server:
        ready = time.monotonic()
        try:
            with tqdm(dynamic_ncols=True) as bar:
                content, node_seconds = asyncio.run(_talk(server.address, bar))
        except (PromptRefused, PromptFailed) as error:
            raise SystemExit(f"ComfyUI says: {error}; its log is {server.log}") from error
        made = time.monotonic()
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_bytes(content)
    times = {
        "obtain ComfyUI": found - started,
        "start ComfyUI": ready - found,
        **{f"  {title}": seconds for title, seconds in node_seconds.items()},
        "make the video": made - ready,
        "in all": time.monotonic() - started,
    }
    lines = [f"{name:40}{seconds:7.1f} s" for name, seconds in times.items()]
    sys.stdout.write("\n".join([*lines, f"the video: {RESULT}", ""]))


if __name__ == "__main__":
    main()
