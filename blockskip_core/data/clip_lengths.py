"""Lengths of clips, in pictures and in latent frames."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClipLengths:
    """How many pictures a video model's clips have, and how many latent frames these become.

    A single picture is always one latent frame. Longer clips have ``shortest + n * step`` pictures, and
    ``shortest_latent + n * step_latent`` latent frames; n is 0 or more.
    """

    shortest: int
    shortest_latent: int
    step: int
    step_latent: int

    def latent_frames(self, pictures: int) -> int | None:
        """Return the number of latent frames, or None if no clip is that long."""
        if pictures == 1:
            return 1
        steps, rest = divmod(pictures - self.shortest, self.step)
        return None if rest or steps < 0 else self.shortest_latent + steps * self.step_latent

    def pictures(self, latent_frames: int) -> int:
        """Return the number of pictures; the inverse of :meth:`latent_frames`."""
        if latent_frames == 1:
            return 1
        return self.shortest + (latent_frames - self.shortest_latent) // self.step_latent * self.step

    def near(self, pictures: int) -> tuple[int, int]:
        """Return the next shorter and the next longer clip."""
        below = max(0, pictures - self.shortest) // self.step
        return self.shortest + below * self.step, self.shortest + (below + 1) * self.step
