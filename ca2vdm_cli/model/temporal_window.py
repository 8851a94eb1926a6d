"""The temporal window: which clean frames a chunk sees, and the slot and position of each frame."""

from __future__ import annotations

from ca2vdm_cli.config import ModelConfig, SpatialPrefix, TemporalPositions
from ca2vdm_cli.errors import UsageError


class TemporalWindow:
    """Which clean frames a chunk sees, and for each frame its slot in the ring and its temporal position.

    Args:
        config: the model.
        context_frames: window in frames; the model's own by default.
        sink_frames: first frames that always stay in the window; the model's own by default.

    Raises:
        UsageError: the model's positions can't express this window, or it has no room for sinks and spatial prefix.
    """

    def __init__(self, config: ModelConfig, context_frames: int | None = None, sink_frames: int | None = None) -> None:
        self.kind = config.temporal_positions
        self.context_frames = config.context_frames if context_frames is None else context_frames
        self.sink_frames = config.sink_frames if sink_frames is None else sink_frames
        self.slots = self.context_frames + config.chunk_frames
        self.chunk_frames, self.table = config.chunk_frames, config.table_length
        largest = self.table - config.chunk_frames
        if self.kind is TemporalPositions.CYCLIC and self.context_frames > largest:
            raise UsageError(
                f"context_frames: {self.context_frames} is more than the {largest} of the model's position table"
            )
        if self.context_frames < 1:
            raise UsageError(f"context_frames: {self.context_frames} must be at least 1")
        prefix = config.spatial_prefix_frames
        if config.spatial_prefix is SpatialPrefix.PREV_FRAMES and self.context_frames - self.sink_frames < prefix:
            raise UsageError(
                f"context_frames: {self.context_frames} must leave room, beside {self.sink_frames} sink frames, for "
                f"the {prefix} frames of the spatial prefix"
            )
        if self.sink_frames and self.sink_frames > self.context_frames - config.chunk_frames:
            raise UsageError(
                f"sink_frames: {self.sink_frames} must leave a chunk of {config.chunk_frames} frames free "
                f"in a window of {self.context_frames}"
            )

    def _wrap(self, frame: int, length: int) -> int:
        """Wrap a frame number at ``length``; sinks keep theirs."""
        if frame < self.sink_frames:
            return frame
        return self.sink_frames + (frame - self.sink_frames) % (length - self.sink_frames)

    def slot(self, frame: int) -> int:
        """A frame's slot in the temporal ring."""
        return self._wrap(frame, self.slots)

    def sink_shift(self, start: int) -> int:
        """rope: how far the sinks shift to stay directly before the rest of a window that ends at ``start``; else 0."""
        return max(0, start - self.context_frames) if self.kind is TemporalPositions.ROPE else 0

    def position(self, frame: int, start: int) -> int:
        """Temporal position of a frame as seen by the chunk that begins at frame ``start``.

        Raises:
            UsageError: the frame is beyond a position table that does not wrap.
        """
        self.check_length(frame + 1)
        if self.kind is TemporalPositions.ROPE:
            return frame + (self.sink_shift(start) if frame < self.sink_frames else 0)
        if self.kind is TemporalPositions.CYCLIC:
            return self._wrap(frame, self.table)
        return frame

    @property
    def longest(self) -> int | None:
        """The most frames that a video can have; None with positions that wrap or rotate."""
        return self.table if self.kind is TemporalPositions.ABSOLUTE else None

    def check_length(self, frames: int) -> None:
        """Raise ``UsageError`` if a video of this length (in whole chunks) does not fit the position table."""
        if self.longest is not None and frames > self.longest:
            raise UsageError(
                f"frames: this model's absolute positions allow at most {self.longest} frames in whole chunks of "
                f"{self.chunk_frames}; request fewer, or use a model with cyclic or rope positions"
            )

    def context(self, start: int) -> list[int]:
        """The clean frames that a chunk starting at frame ``start`` sees, oldest first."""
        if start <= self.context_frames:
            return list(range(start))
        return [*range(self.sink_frames), *range(start - self.context_frames + self.sink_frames, start)]
