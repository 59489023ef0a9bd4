"""One run from inputs to a take on disk: begun, or continued where an earlier run stopped.

The command line, the sampler node and the benchmark all go through ``render_video``. It finds the
speakers' regions, plans the chunks, computes the cache key, opens the take, and generates and
writes the chunks that are missing. Separate from ``pipeline``, which knows no files.

Axes: T video frames, H height, W width, C channels, P speakers and last the background.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .conditioning.reference import References
from .conditioning.regions import find_masks, fit_regions
from .pipeline import Models, NoProgress, count_work, generate, never_stop, plan_video
from .protocols import CheckStop, Progress
from .request import TalkRequest
from .takes.cache_key import CacheKey, identify
from .takes.take import Take, TakeWriter, open_take
from .types import ChunkPlan, Conversation, Speaker

_NO_PROGRESS = NoProgress()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """An open take and what remains to be done for it; made by ``render_video``.

    Attributes:
        request: all settings.
        references: the pictures, fitted to the video.
        conversation: what is said.
        models: the networks.
        regions_PHW: of several speakers; None for one.
        plan: all chunks of the video.
        found: the take as an earlier run left it; without chunks where the take begins anew.
        writer: writes to the take.
    """

    request: TalkRequest
    references: References
    conversation: Conversation
    models: Models
    regions_PHW: Tensor | None
    plan: ChunkPlan
    found: Take
    writer: TakeWriter

    @property
    def take(self) -> Take:
        """The take with all chunks that are on the disk by now; complete after the block."""
        return self.writer.take

    @property
    def changes(self) -> tuple[str, ...]:
        """Why an unfinished take in the folder was discarded; empty where none was."""
        return self.writer.changes

    @property
    def num_chunks(self) -> int:
        """Chunks of the whole video."""
        return len(self.plan.chunks)

    @property
    def num_finished(self) -> int:
        """Chunks that an earlier run finished."""
        return len(self.found.chunks)

    @property
    def num_units(self) -> int:
        """Units of work that remain, as ``generate`` reports them to a ``Progress``."""
        return count_work(self.plan, self.request, len(self.references), self.num_finished)

    def read_finished(self) -> Iterator[Tensor]:
        """Read the frames that an earlier run finished.

        Yields:
            uint8 [T, H, W, 3], in small batches; nothing where the take begins.
        """
        if self.found.chunks:
            yield from self.found.iterate()

    def generate(
        self, progress: Progress = _NO_PROGRESS, check_stop: CheckStop = never_stop
    ) -> Iterator[Tensor]:
        """Generate the chunks that are missing; each is written while the next is generated.

        Args:
            progress: counts the units of ``num_units``.
            check_stop: raises to stop; chunks that were yielded stay on the disk.

        Yields:
            The new frames of each chunk as they are in the file, uint8 [T, H, W, 3].

        Raises:
            MismatchError: models or pictures that do not fit the request.
            RequestError: text guidance without a prompt.
            OutOfMemoryError: the device has too little memory.
            OutputError: the disk refused a chunk.
        """
        if self.found.is_whole:
            return
        for chunk in generate(
            self.request,
            self.references,
            self.conversation.speeches,
            self.models,
            progress=progress,
            check_stop=check_stop,
            regions_PHW=self.regions_PHW,
            chunk_state=self.writer.chunk_state,
        ):
            yield self.writer.write(chunk)

    def frames(
        self, progress: Progress = _NO_PROGRESS, check_stop: CheckStop = never_stop
    ) -> Iterator[Tensor]:
        """Read the finished frames, then generate the missing ones.

        Args:
            progress: see ``generate``.
            check_stop: see ``generate``.

        Yields:
            All frames of the video in order, uint8 [T, H, W, 3].
        """
        yield from self.read_finished()
        yield from self.generate(progress, check_stop)


@contextmanager
def render_video(
    request: TalkRequest,
    pictures: Sequence[Tensor],
    conversation: Conversation,
    models: Models,
    folder: Path | Callable[[CacheKey], Path],
    *,
    weights: str = "",
    others: Mapping[str, str] | None = None,
) -> Iterator[Rendering]:
    """Open the take of a video, to generate what is missing of it.

    Args:
        request: all settings.
        pictures: the portrait alone, or the frames of a video to dub; [H, W, C] in [0, 1], any
            size, as ``reference.prepare_reference`` takes them.
        conversation: of one speaker or several.
        models: the networks.
        folder: of the take; or a function that chooses it by the cache key.
        weights: fingerprint of the networks' weights. Without it, a take that was begun with other
            weights is continued.
        others: what else decides the frames, by names for people.

    Yields:
        The open take. Chunks are whole on the disk when the block has ended.

    Raises:
        ImageError: regions that the picture or the video cannot have.
        OutputError: the folder holds something else, another program writes to it, or the disk
            refused.
    """
    regions_PHW = find_regions(request, pictures[0], conversation.speakers)
    plan = plan_video(request, conversation.speeches)
    key = identify(
        request,
        conversation.speeches,
        pictures,
        {"regions": regions_PHW, **models.list_told()},
        weights,
        others,
    )
    with open_take(
        folder if isinstance(folder, Path) else folder(key),
        conversation.waveform,
        height=request.height,
        width=request.width,
        length=plan.num_frames,
        identity=key,
    ) as writer:
        yield Rendering(
            request=request,
            references=References(pictures, request.height, request.width),
            conversation=conversation,
            models=models,
            regions_PHW=regions_PHW,
            plan=plan,
            found=writer.take,
            writer=writer,
        )


def find_regions(
    request: TalkRequest, picture_HWC: Tensor, speakers: Sequence[Speaker]
) -> Tensor | None:
    """Find the region of each speaker on the latent cells of the video.

    Needs no network, so callers that load networks late can check the regions before.

    Args:
        request: gives the size of the video.
        picture_HWC: that the speakers' regions were drawn on.
        speakers: all of the conversation.

    Returns:
        The regions of ``regions.fit_regions``; None for one speaker.

    Raises:
        ImageError: regions that are missing, overlap, or lie outside the picture or the video.
    """
    rows, columns = picture_HWC.shape[:2]
    masks = find_masks(speakers, (rows, columns))
    if masks is None:
        return None
    names = [speaker.name for speaker in speakers]
    return fit_regions(masks, request.height, request.width, names)
