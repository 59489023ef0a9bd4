"""Rendering of a talking video to a take on disk, continuing an unfinished one.

The command line, the sampler node and the benchmark all go through ``render_video``. It finds the
speakers' regions, plans the chunks, computes the cache key, opens the take, and generates and
writes the chunks that are missing. Separate from ``pipeline``, which does not use files.

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
from .takes.cache_key import CacheKey, compute_cache_key
from .takes.take import Take, TakeWriter, open_take
from .types import ChunkPlan, Conversation, Speaker

_NO_PROGRESS = NoProgress()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """An open take and what remains to be done for it; made by ``render_video``.

    Attributes:
        request: all settings.
        references: the pictures, fitted to the video.
        conversation: the encoded voices.
        models: the networks.
        regions_PHW: regions of several speakers; None for one.
        plan: all chunks of the video.
        found: the take as an earlier run left it; without chunks if the take is new.
        writer: writer of the take.
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
        """The take with all chunks that are on disk so far; complete after the block."""
        return self.writer.take

    @property
    def changes(self) -> tuple[str, ...]:
        """Why an unfinished take in the folder was discarded; empty if none was."""
        return self.writer.changes

    @property
    def num_chunks(self) -> int:
        """Number of chunks of the whole video."""
        return len(self.plan.chunks)

    @property
    def num_finished(self) -> int:
        """Number of chunks that an earlier run finished."""
        return len(self.found.chunks)

    @property
    def num_units(self) -> int:
        """Number of units of work that remain, as ``generate`` counts them."""
        return count_work(self.plan, self.request, len(self.references), self.num_finished)

    def read_finished(self) -> Iterator[Tensor]:
        """Read the frames that an earlier run finished.

        Yields:
            uint8 [T, H, W, 3], in small batches; nothing for a new take.
        """
        if self.found.chunks:
            yield from self.found.iterate()

    def generate(
        self, progress: Progress = _NO_PROGRESS, check_stop: CheckStop = never_stop
    ) -> Iterator[Tensor]:
        """Generate the chunks that are missing; each is written while the next is generated.

        Args:
            progress: counts the units of ``num_units``.
            check_stop: raises an exception to stop; chunks that were yielded stay on disk.

        Yields:
            The new frames of each chunk as they are in the file, uint8 [T, H, W, 3].

        Raises:
            MismatchError: if models or pictures do not fit the request.
            RequestError: if there is text guidance without a prompt.
            OutOfMemoryError: if the device has too little memory.
            OutputError: if a chunk cannot be written.
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
    is_locked: bool = False,
) -> Iterator[Rendering]:
    """Open the take of a video, to generate its missing chunks.

    Args:
        request: all settings.
        pictures: the portrait alone, or the frames of a video to dub; [H, W, C] in [0, 1], any
            size, as ``reference.prepare_reference`` takes them.
        conversation: the encoded voices of one speaker or several.
        models: the networks.
        folder: folder of the take; or a function that chooses it by the cache key.
        weights: fingerprint of the networks' weights. Without it, an unfinished take that was made
            with other weights is continued.
        others: all else that determines the frames, by readable names.
        is_locked: whether the caller is inside of ``takes.lock_take`` for the folder.

    Yields:
        The open take. All its files are complete when the block has ended.

    Raises:
        ImageError: if the regions do not fit the picture or the video.
        OutputError: if the folder contains other files, another program is writing to it, or the
            disk cannot be written.
    """
    regions_PHW = find_regions(request, pictures[0], conversation.speakers)
    plan = plan_video(request, conversation.speeches)
    key = compute_cache_key(
        request,
        conversation.speeches,
        pictures,
        {"regions": regions_PHW, **models.cache_fields()},
        weights,
        others,
    )
    with open_take(
        folder if isinstance(folder, Path) else folder(key),
        conversation.waveform,
        height=request.height,
        width=request.width,
        length=plan.num_frames,
        cache_key=key,
        is_locked=is_locked,
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
    """Return the region of each speaker on the latent cells of the video.

    It needs no network, so callers can check the regions before they load networks.

    Args:
        request: contains the size of the video.
        picture_HWC: the picture on which the speakers' regions were drawn.
        speakers: all speakers of the conversation.

    Returns:
        The regions of ``regions.fit_regions``; None for one speaker.

    Raises:
        ImageError: if regions are missing, overlap, or lie outside the picture or the video.
    """
    rows, columns = picture_HWC.shape[:2]
    masks = find_masks(speakers, (rows, columns))
    if masks is None:
        return None
    names = [speaker.name for speaker in speakers]
    return fit_regions(masks, request.height, request.width, names)
