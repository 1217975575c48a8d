"""A small classifier that recognises the content of the world's pictures: which object is where, on which ground.

It judges samples (is the star red, is it left?) and compares subjects: the cosine between two pictures' features is
the demo's measure of subject fidelity. It is trained only on drawn pictures and never used for training a LoRA.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

import world

READING_SIZE = 128
NO_SUBJECT = "toy"
SHARPNESS = ("sharp", "soft", "smudged")
ANSWERS: dict[str, tuple[str, ...]] = {
    "shape": world.SHAPES,
    "colour": tuple(world.COLOURS),
    "size": tuple(world.SIZES),
    "finish": world.FINISHES,
    "ground": world.GROUNDS,
    "place": tuple(world.PLACES),
    "subject": (NO_SUBJECT, *world.SUBJECTS),
    "sharpness": SHARPNESS,
}
UNSAID = -100  # the answer to a question that does not apply to a picture, e.g. a subject's shape
WIDTHS = (24, 48, 96, 128)


def answers_of(scene: world.Scene | world.SubjectScene) -> dict[str, str]:
    """The right answers for a scene, without its sharpness."""
    if isinstance(scene, world.SubjectScene):
        return {"subject": scene.subject, "ground": scene.ground, "place": scene.place}
    named = {name: getattr(scene, name) for name in ("shape", "colour", "size", "finish", "ground", "place")}
    return {**named, "subject": NO_SUBJECT}


def answer_ids(scene: world.Scene | world.SubjectScene) -> list[int]:
    """The answers as class numbers, one per question in the order of `ANSWERS`."""
    said = answers_of(scene)
    return [choices.index(said[name]) if name in said else UNSAID for name, choices in ANSWERS.items()]


def _layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3 x 3 convolution, batch norm, SiLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.SiLU())


class Reader(nn.Module):
    """Pictures ``[B, 3, 128, 128]`` in [0, 1] to scores per question.

    A soft spotlight finds the object. The answers come from the object's features, the spotlight's position and, for
    the ground, the mean over all positions.
    """

    def __init__(self) -> None:
        super().__init__()
        a, b, c, d = WIDTHS
        self.trunk = nn.Sequential(
            _layer(3, a, 2), _layer(a, b, 2), _layer(b, b), _layer(b, c, 2), _layer(c, c), _layer(c, d, 2), _layer(d, d)
        )  # fmt: skip
        self.spotlight = nn.Conv2d(d, 1, 1)
        self.mix = nn.Sequential(nn.Linear(2 * d + 2, d), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(d, len(choices)) for name, choices in ANSWERS.items()})
        self.register_buffer("centre", torch.zeros(d))

    def _described(self, pictures: Tensor) -> Tensor:
        """Return the heads' input, ``[B, 128]``."""
        if pictures.shape[-1] != READING_SIZE:
            pictures = interpolate(pictures, (READING_SIZE, READING_SIZE), mode="bilinear", antialias=True)
        maps = self.trunk(pictures * 2 - 1)
        rows, columns = maps.shape[-2:]
        light = self.spotlight(maps).flatten(2).softmax(dim=-1)
        seen = (maps.flatten(2) * light).sum(dim=-1)
        grid = torch.cartesian_prod(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns)).to(maps)
        place = light.squeeze(1) @ grid
        return self.mix(torch.cat([seen, maps.mean(dim=(2, 3)), place], dim=1))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Scores ``[B, choices]`` of every question."""
        described = self._described(pictures)
        return {name: head(described) for name, head in self.heads.items()}

    def features(self, pictures: Tensor) -> Tensor:
        """Features ``[B, 128]`` about the mean of drawn pictures, for cosines."""
        return self._described(pictures) - self.centre


def load_reader(path: Path) -> Reader:
    """Load the shipped reader for inference.

    Raises:
        ValueError: If the file is missing, damaged or another kind of file.
    """
    reader = Reader()
    wanted = {name for name, value in reader.state_dict().items() if value.is_floating_point()}
    try:
        state = {name: value.float() for name, value in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} cannot be read ({error}). Make it with train_reader.py.") from error
    if set(state) != wanted:
        raise ValueError(f"{path.name} is not the world's reader. Make it with train_reader.py.")
    reader.load_state_dict(state, strict=False)
    return reader.eval()


@torch.no_grad()
def read(reader: Reader, pictures: Tensor) -> list[dict[str, str]]:
    """Answers for pictures ``[B, 3, H, W]`` in [0, 1]."""
    chosen = {name: scores.argmax(dim=1).tolist() for name, scores in reader(pictures).items()}
    return [{name: ANSWERS[name][ids[i]] for name, ids in chosen.items()} for i in range(len(pictures))]


@torch.no_grad()
def similarity(reader: Reader, pictures: Tensor, references: Tensor) -> Tensor:
    """Cosine ``[B]`` between the features of pictures and of references, ``[B, 3, H, W]`` each."""
    return torch.cosine_similarity(reader.features(pictures), reader.features(references), dim=1)
