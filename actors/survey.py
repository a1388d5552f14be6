"""The first look at videos: headers, packets and one frame, so that clips can be planned before they are made."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Final

from ..cluster.storage import Storage
from .clips import BadVideo, ClipSettings, Skipped
from .decode_lane import DecodeLane
from .sources import VideoFile, VideoFolder

SURVEY_FORMAT: Final = 1  # raised when the rows, or what they mean, change
FOLDER: Final = "survey"

FILTER, SURVEY = "filter", "survey"  # stages: what was left out by choice, and what cannot be read

# A row per video: path, bytes, seconds, width, height, frames_per_second, clips, and why there is none.
Row = dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """Videos that are surveyed together, and the file in the data set's folder that keeps the result.

    The name says all that decides the content, so what an interrupted run left is used by the next one.
    """

    videos: tuple[VideoFile, ...]
    name: str

    @classmethod
    def of(cls, videos: tuple[VideoFile, ...], settings: ClipSettings, version: str) -> "Chunk":
        """version: of the library that reads."""
        content = [SURVEY_FORMAT, version, asdict(settings), [[video.path, video.size] for video in videos]]
        return cls(videos, f"{FOLDER}/{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}.json")


class Surveyor:
    """A pool's worker that looks at one chunk of videos at a time."""

    def __init__(self, videos: VideoFolder, out: Storage, settings: ClipSettings) -> None:
        self._videos = videos
        self._out = out
        self._lane = DecodeLane(settings)

    def process(self, chunk: Chunk) -> Row:
        """Publish the rows of a chunk; how many videos they are."""
        rows = [self.survey(video) for video in chunk.videos]
        self._out.publish(chunk.name, json.dumps(rows, sort_keys=True).encode(), replace=True)
        return {"videos": len(rows)}

    def survey(self, video: VideoFile) -> Row:
        """One video's row."""
        row = {"path": video.path, "bytes": video.size, "clips": 0}
        try:
            with self._videos.local(video.path) as path:
                found = self._lane.survey(path)
        except BadVideo as bad:
            return {**row, "stage": SURVEY, "reason": bad.reason, "detail": bad.text}
        if isinstance(found, Skipped):
            return {**row, "stage": FILTER, "reason": found.reason, "detail": found.text}
        return {**row, **asdict(found)}

    def close(self) -> None:
        """End the lane."""
        self._lane.close()
