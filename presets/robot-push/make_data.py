"""Render robot-push: a robot arm that pushes three coloured things about on a table, 64x64 pixels, 20 frames a second.

    pip install pybullet
    python make_data.py robot-push-data --jobs 2

It needs pybullet 3.2 (with the KUKA arm, table and floor that come with it), NumPy and PyAV, no display and no GPU. A
second run goes on where an interrupted one stopped: finished files are kept. What is written:

    OUT/train/00000.mp4 …            1,600 sequences of 120 frames, seeds 0 to 1599
    OUT/test/20000.mp4 …             16 sequences of 640 frames, seeds 20000 to 20015
    OUT/validation/10000.mp4 …       40 sequences of 120 frames, seeds 10000 to 10039
    OUT/states/20000.npz …           what is where in every frame of the test sequences (see ``write_states``)

207,040 frames, H.264 (yuv444p, nearly lossless), for ``ca2vdm train --data OUT --validation-data OUT/validation``.

The world. A sequence is a function of its seed and its length. Of four things (a red and a blue block, a green and a
yellow cylinder) three lie on the table; which, and where, is random. The arm holds a dark rod, upright and with its end
just above the table, that moves at an even speed and turns at a bounded rate. Its goals are random: mostly it goes
behind a thing, seen from a random place near the middle, and pushes it there; every so often it goes to a random place.
Most things in its way are pushed too. Only the rod touches things; the joints of the arm follow from where the rod is,
in closed form. Camera and light are fixed, and nothing casts a shadow.

What keeps things on the table and in sight: pushes go towards the middle; things far out are pushed more often; the rod
goes round what it would push farther out, and goes back from what does not give way; and four walls that are not seen
hold things (not the rod) within ``THING_AREA``. A sequence in which a thing tips over, or is squeezed past a wall by
two centimetres, is thrown away and simulated again with the next random numbers of its seed. How often that was, and
the share of frames in which a thing is being pushed, are printed at the end and written to ``OUT/measured.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import av
import numpy as np
import pybullet
import pybullet_data
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Image = NDArray[np.uint8]

SIZE, SUPERSAMPLING = 64, 2
"""Pixels of a side, and how many times as many are rendered and then averaged."""
FPS, PHYSICS_RATE = 20, 240
SPLITS = {"train": (0, 1600, 120), "validation": (10_000, 40, 120), "test": (20_000, 16, 640)}
"""First seed, sequences and frames of each."""

MIDDLE = np.array([0.53, 0.0])
"""Metres on the table from the arm's base, x towards the camera and y to the right of the picture."""
THING_AREA = np.array([0.12, 0.20])
"""How far from the middle the centre of a thing can be pushed, along x and y."""
GOAL_AREA = np.array([0.07, 0.13])
"""The same for the places that things are pushed to."""
ROD_AREA = np.array([0.20, 0.28])
"""The same for the rod."""
ROD_RADIUS, ROD_LENGTH, ROD_HEIGHT = 0.018, 0.24, 0.01
"""Of its end above the table."""
ROD_FORCE = 40.0
"""Newtons with which it can push."""
ROD_LAG = 0.015
"""How far, in metres, it may stay behind where it is moved to."""
SPEED, TURN = 0.018, 0.7
"""Of the rod: metres and, at most, radians a frame."""
BLOCK, CYLINDER = 0.042, 0.046
"""Half the side of a block; the radius of a cylinder."""
COLOURS = {
    "red block": (0.85, 0.08, 0.08),
    "green cylinder": (0.10, 0.62, 0.15),
    "blue block": (0.10, 0.20, 0.90),
    "yellow cylinder": (0.98, 0.80, 0.05),
}
NAMES = tuple(COLOURS)
THINGS = 3
MOVED = 0.002
"""A thing that has moved by this many metres since the last frame is being pushed."""
ATTEMPTS = 200
"""Simulations of a sequence until it is given up."""
AT_ONCE = 8
"""Sequences that a process makes in a row, with one renderer."""

SHOULDER, UPPER_ARM, FOREARM, HAND = 0.36, 0.42, 0.40, 0.126
"""Of the arm, in metres: height of its second joint, and the distances from there to the elbow, wrist and flange."""
UNSEEN_LINKS = {f"lbr_iiwa_link_{number}" for number in (1, 2, 3, 4)}
EYE, FOCUS, VIEW_ANGLE = (1.14, 0.0, 0.78), (0.49, 0.0, 0.03), 35.0
"""The camera: where it is, where it looks, and how many degrees of height it sees."""


@dataclass(frozen=True)
class Sequence:
    """What happens in a sequence, frame by frame."""

    kinds: tuple[int, ...]
    """Which of ``NAMES`` are there."""
    rod: Floats
    """(T, 2) where the rod is."""
    places: Floats
    """(T, THINGS, 3) the centres of the things."""
    turns: Floats
    """(T, THINGS, 4) their orientations, as quaternions."""
    attempts: int
    """How many times it was simulated until everything stayed in sight."""

    @property
    def pushing(self) -> NDArray[np.bool_]:
        """(T,) whether anything has moved since the frame before."""
        moved = np.linalg.norm(np.diff(self.places, axis=0), axis=-1).max(1) >= MOVED
        return np.concatenate([moved[:1], moved])


class Policy:
    """Where the rod goes next."""

    def __init__(self, rng: np.random.Generator, rod: Floats) -> None:
        self.rng, self.rod = rng, rod
        self.heading = float(rng.uniform(-math.pi, math.pi))
        self._plan: list[Floats] = []
        self._thing: int | None = None
        self._target = MIDDLE
        self._left = 0

    def move(self, places: Floats) -> Floats:
        """The rod's next place, among things at ``places`` (THINGS, 2)."""
        self._left -= 1
        while self._plan and np.linalg.norm(self._plan[0] - self.rod) < 0.03:
            self._plan.pop(0)
        if self._left < 0 or self._done(places):
            self._choose(places)
        way = self._past(places, _unit(self._plan[0] - self.rod) if self._plan else self._push(places))
        error = (math.atan2(way[1], way[0]) - self.heading + math.pi) % (2 * math.pi) - math.pi
        self.heading += max(-TURN, min(TURN, error))
        step = SPEED * max(0.2, math.cos(error))
        ahead = self.rod + step * np.array([math.cos(self.heading), math.sin(self.heading)])
        self.rod = np.clip(ahead, MIDDLE - ROD_AREA, MIDDLE + ROD_AREA)
        return self.rod

    def give_way(self, rod: Floats) -> None:
        """Go back from what holds the rod up, and then do something else."""
        self.rod, self._thing = rod, None
        self._plan = [rod - 0.07 * np.array([math.cos(self.heading), math.sin(self.heading)])]

    def _past(self, places: Floats, way: Floats) -> Floats:
        """A way, bent around things that it would push out at the edge."""
        for place in places:
            to_thing = place - self.rod
            outward = np.where(np.abs(place - MIDDLE) > 0.75 * THING_AREA, np.sign(place - MIDDLE), 0)
            if np.linalg.norm(to_thing) < 0.085 and way @ to_thing > 0 and to_thing @ outward > 0:
                side = _unit(np.array([-to_thing[1], to_thing[0]]))
                ahead = np.array([math.cos(self.heading), math.sin(self.heading)])
                way = side if side @ ahead > 0 else -side
        return way

    def _done(self, places: Floats) -> bool:
        if self._plan:
            return False
        if self._thing is None:
            return True
        to_target, to_thing = self._target - places[self._thing], places[self._thing] - self.rod
        return bool(np.linalg.norm(to_target) < 0.02 or np.linalg.norm(to_thing) > 0.14 or to_target @ to_thing < 0)

    def _choose(self, places: Floats) -> None:
        self._left = 60
        if self.rng.random() < 0.15:
            self._thing = None
            self._plan = [MIDDLE + ROD_AREA * self.rng.uniform(-0.9, 0.9, 2)]
            return
        outness = np.linalg.norm((places - MIDDLE) / THING_AREA, axis=1) + 0.15
        self._thing = int(self.rng.choice(len(places), p=outness / outness.sum()))
        thing = places[self._thing]
        self._target = MIDDLE + GOAL_AREA * self.rng.uniform(-1, 1, 2)
        while np.linalg.norm(self._target - thing) < 0.09:
            self._target = MIDDLE + GOAL_AREA * self.rng.uniform(-1, 1, 2)
        direction = _unit(self._target - thing)
        behind = thing - 0.085 * direction
        self._plan = [behind]
        way = _unit(behind - self.rod)
        nearest = self.rod + way * max(0.0, float((thing - self.rod) @ way))
        if np.linalg.norm(nearest - thing) < 0.085 and (thing - self.rod) @ direction < 0:  # around it
            side = np.array([-direction[1], direction[0]])
            side = side if (self.rod - thing) @ side > 0 else -side
            self._plan.insert(0, thing + 0.1 * side)

    def _push(self, places: Floats) -> Floats:
        """The way to go on pushing: towards the target, and towards the line behind the thing."""
        assert self._thing is not None
        direction = _unit(self._target - places[self._thing])
        side = np.array([-direction[1], direction[0]])
        off = float((self.rod - places[self._thing]) @ side)
        return _unit(direction - side * max(-1.0, min(1.0, off / 0.04)))


def _unit(way: Floats) -> Floats:
    return np.asarray(way / max(1e-9, float(np.linalg.norm(way))))


def simulate(seed: int, frames: int) -> Sequence:
    """What happens in the sequence of a seed."""
    for attempt in range(ATTEMPTS):
        sequence = _attempt(np.random.default_rng((seed, attempt)), frames, attempt + 1)
        if sequence is not None:
            return sequence
    raise RuntimeError(f"seed {seed}: something left the picture in each of {ATTEMPTS} attempts")


def _attempt(rng: np.random.Generator, frames: int, attempts: int) -> Sequence | None:
    """One simulation; None if something left the picture or tipped over."""
    client = pybullet.connect(pybullet.DIRECT)
    try:
        pybullet.setGravity(0, 0, -9.8)
        pybullet.setTimeStep(1 / PHYSICS_RATE)
        table = pybullet.createMultiBody(0, pybullet.createCollisionShape(pybullet.GEOM_BOX, halfExtents=[2, 2, 0.1]))
        pybullet.resetBasePositionAndOrientation(table, [0, 0, -0.1], [0, 0, 0, 1])
        pybullet.changeDynamics(table, -1, lateralFriction=1.0)
        kinds = tuple(int(kind) for kind in np.sort(rng.permutation(len(NAMES))[:THINGS]))
        places = _beginning(rng)
        things = [
            _make_thing(kind, place, float(rng.uniform(-math.pi, math.pi)), visible=False)
            for kind, place in zip(kinds, places[1:], strict=True)
        ]
        shape = pybullet.createCollisionShape(pybullet.GEOM_CYLINDER, radius=ROD_RADIUS, height=ROD_LENGTH)
        height = ROD_HEIGHT + ROD_LENGTH / 2
        rod = pybullet.createMultiBody(2.0, shape, basePosition=[*places[0], height])
        pybullet.changeDynamics(rod, -1, lateralFriction=0.3)
        for axis, sign in ((0, 1), (0, -1), (1, 1), (1, -1)):
            half, centre = np.array([0.5, 0.5, 0.1]), np.array([*MIDDLE, 0.1])
            half[axis] = 0.05
            centre[axis] += sign * (THING_AREA[axis] + BLOCK + half[axis])
            wall = pybullet.createMultiBody(0, pybullet.createCollisionShape(pybullet.GEOM_BOX, halfExtents=half))
            pybullet.resetBasePositionAndOrientation(wall, centre, [0, 0, 0, 1])
            pybullet.changeDynamics(wall, -1, lateralFriction=0.05)
            pybullet.setCollisionFilterPair(rod, wall, -1, -1, 0)
        hold = pybullet.createConstraint(rod, -1, -1, -1, pybullet.JOINT_FIXED, [0] * 3, [0] * 3, [*places[0], height])
        policy = Policy(rng, places[0])
        rods: list[Floats] = []
        poses: list[list[tuple[tuple[float, ...], tuple[float, ...]]]] = []
        before = policy.rod
        for frame in range(-4, frames):
            now = np.array([pybullet.getBasePositionAndOrientation(thing)[0][:2] for thing in things])
            after = policy.move(now) if frame >= 0 else before  # things come to rest first
            substeps = PHYSICS_RATE // FPS
            for substep in range(1, substeps + 1):
                held = before + (after - before) * substep / substeps
                pybullet.changeConstraint(hold, [*held, height], maxForce=ROD_FORCE)
                pybullet.stepSimulation()
            before = after
            if frame < 0:
                continue
            seen = [pybullet.getBasePositionAndOrientation(thing) for thing in things]
            if not all(_in_sight(place, turn) for place, turn in seen):
                return None
            rods.append(np.array(pybullet.getBasePositionAndOrientation(rod)[0][:2]))
            if np.linalg.norm(before - rods[-1]) > ROD_LAG:  # something is in the way
                before = rods[-1]
                policy.give_way(before)
            poses.append(seen)
        return Sequence(
            kinds,
            np.array(rods),
            np.array([[place for place, _ in seen] for seen in poses]),
            np.array([[turn for _, turn in seen] for seen in poses]),
            attempts,
        )
    finally:
        pybullet.disconnect(client)


def _beginning(rng: np.random.Generator) -> list[Floats]:
    """Where the rod and the things are at first: not too near to each other."""
    while True:
        places = [MIDDLE + ROD_AREA * rng.uniform(-0.9, 0.9, 2)]
        places += [MIDDLE + THING_AREA * rng.uniform(-0.9, 0.9, 2) for _ in range(THINGS)]
        if min(np.linalg.norm(a - b) for i, a in enumerate(places) for b in places[:i]) > 0.12:
            return places


def _in_sight(place: tuple[float, ...], turn: tuple[float, ...]) -> bool:
    upright = 1 - 2 * (turn[0] ** 2 + turn[1] ** 2)
    return bool(upright > 0.95 and np.all(np.abs(np.array(place[:2]) - MIDDLE) <= THING_AREA + 0.02))


def _make_thing(kind: int, place: Floats, angle: float, *, visible: bool) -> int:
    """A block or a cylinder; only to be seen, or only to be pushed."""
    colour = [*COLOURS[NAMES[kind]], 1]
    shape, height = -1, BLOCK if "block" in NAMES[kind] else 0.8 * CYLINDER
    if "block" in NAMES[kind]:
        sides = [BLOCK] * 3
        if visible:
            shape = pybullet.createVisualShape(pybullet.GEOM_BOX, halfExtents=sides, rgbaColor=colour)
        else:
            shape = pybullet.createCollisionShape(pybullet.GEOM_BOX, halfExtents=sides)
    elif visible:
        shape = pybullet.createVisualShape(pybullet.GEOM_CYLINDER, radius=CYLINDER, length=2 * height, rgbaColor=colour)
    else:
        shape = pybullet.createCollisionShape(pybullet.GEOM_CYLINDER, radius=CYLINDER, height=2 * height)
    pose = {
        "basePosition": [*place, height],
        "baseOrientation": pybullet.getQuaternionFromEuler([0, 0, angle]),
    }
    if visible:
        return int(pybullet.createMultiBody(0, -1, shape, **pose))
    thing = int(pybullet.createMultiBody(0.2, shape, **pose))
    pybullet.changeDynamics(thing, -1, lateralFriction=0.7, linearDamping=0.3, angularDamping=0.5)
    return thing


class Camera:
    """Draws sequences.

    Table and floor never change: they are rendered once, and the arm and the things before them.
    """

    def __init__(self) -> None:
        self._client = pybullet.connect(pybullet.DIRECT)
        pybullet.setAdditionalSearchPath(pybullet_data.getDataPath())
        self._view = pybullet.computeViewMatrix(EYE, FOCUS, [0, 0, 1])
        self._projection = pybullet.computeProjectionMatrixFOV(VIEW_ANGLE, 1, 0.1, 4)
        scenery = [
            pybullet.loadURDF("plane.urdf", [0, 0, -0.625]),
            pybullet.loadURDF("table/table.urdf", [0.5, 0, -0.625]),
        ]
        self._background, _ = self._photograph()
        for body in scenery:
            pybullet.removeBody(body)
        self._arm = _load_arm()
        for link in (-1, 4, 5, 6):
            shade = 0.30 if link in (5, 6) else 0.86
            pybullet.changeVisualShape(self._arm, link, rgbaColor=[shade, shade, shade, 1])
        rod = pybullet.createVisualShape(
            pybullet.GEOM_CYLINDER, radius=ROD_RADIUS, length=ROD_LENGTH, rgbaColor=[0.12, 0.12, 0.12, 1]
        )
        self._rod = pybullet.createMultiBody(0, -1, rod)
        self._things = [_make_thing(kind, np.array([0.0, 9.0]), 0.0, visible=True) for kind in range(len(NAMES))]

    def draw(self, sequence: Sequence, frame: int) -> Image:
        """One frame, (SIZE, SIZE, 3)."""
        for kind, thing in enumerate(self._things):
            if kind in sequence.kinds:
                place = sequence.kinds.index(kind)
                pose = sequence.places[frame, place], sequence.turns[frame, place]
                pybullet.resetBasePositionAndOrientation(thing, *pose)
            else:
                pybullet.resetBasePositionAndOrientation(thing, [0, 9, 0], [0, 0, 0, 1])
        rod = sequence.rod[frame]
        pybullet.resetBasePositionAndOrientation(self._rod, [*rod, ROD_HEIGHT + ROD_LENGTH / 2], [0, 0, 0, 1])
        for joint, angle in enumerate(joints(rod)):
            pybullet.resetJointState(self._arm, joint, angle)
        colours, bodies = self._photograph()
        nothing = bodies < 0
        colours[nothing] = self._background[nothing]
        return average(colours)

    def pixels(self, points: Floats) -> Floats:
        """Where points (..., 3) of the world are in a frame: (..., 2), column and row in pixels."""
        view, projection = (np.array(m).reshape(4, 4).T for m in (self._view, self._projection))
        whole = np.concatenate([points, np.ones((*points.shape[:-1], 1))], axis=-1) @ (projection @ view).T
        places = whole[..., :2] / whole[..., 3:]
        return np.stack([(1 + places[..., 0]) / 2 * SIZE - 0.5, (1 - places[..., 1]) / 2 * SIZE - 0.5], axis=-1)

    def close(self) -> None:
        """End the renderer."""
        pybullet.disconnect(self._client)

    def _photograph(self) -> tuple[Image, NDArray[np.int64]]:
        """Colours, and which body is seen where (-1 for none)."""
        side = SIZE * SUPERSAMPLING
        _, _, colours, _, mask = pybullet.getCameraImage(
            side,
            side,
            self._view,
            self._projection,
            shadow=0,
            lightDirection=[1.0, 0.6, 2.0],
            renderer=pybullet.ER_TINY_RENDERER,
        )
        picture: Image = np.array(colours, np.uint8).reshape(side, side, 4)[..., :3]
        return picture, np.array(mask, np.int64).reshape(side, side)


def average(picture: Image) -> Image:
    """(SUPERSAMPLING · H, SUPERSAMPLING · W, 3) -> (H, W, 3)."""
    steps = range(SUPERSAMPLING)
    parts = [picture[row::SUPERSAMPLING, column::SUPERSAMPLING].astype(np.uint16) for row in steps for column in steps]
    total: NDArray[np.uint16] = np.add.reduce(parts)
    return ((total + len(parts) // 2) // len(parts)).astype(np.uint8)


def _load_arm() -> int:
    """The arm without the meshes of its first links, which are never in the picture: half the work."""
    folder = Path(pybullet_data.getDataPath()) / "kuka_iiwa"
    model = ElementTree.parse(folder / "model.urdf")
    for mesh in model.iter("mesh"):
        mesh.set("filename", str(folder / mesh.get("filename", "")))
    for link in model.iter("link"):
        if link.get("name") in UNSEEN_LINKS:
            for shape in [*link.findall("visual"), *link.findall("collision")]:
                link.remove(shape)
    with TemporaryDirectory() as place:
        path = Path(place, "arm.urdf")
        model.write(path)
        return int(pybullet.loadURDF(str(path), [0, 0, 0], useFixedBase=True))


def joints(rod: Floats) -> tuple[float, ...]:
    """The seven angles of the arm that hold the rod upright at a place, the elbow up."""
    reach = math.hypot(*rod)
    height = ROD_HEIGHT + ROD_LENGTH + HAND - SHOULDER  # of the wrist above the shoulder
    far = math.hypot(reach, height)
    bend = math.pi - math.acos((UPPER_ARM**2 + FOREARM**2 - far**2) / (2 * UPPER_ARM * FOREARM))
    lift = math.acos((UPPER_ARM**2 + far**2 - FOREARM**2) / (2 * UPPER_ARM * far))
    shoulder = math.atan2(reach, height) - lift
    return math.atan2(rod[1], rod[0]), shoulder, 0.0, -bend, 0.0, math.pi - shoulder - bend, 0.0


def write_video(path: Path, camera: Camera, sequence: Sequence) -> None:
    """Render a sequence; the file has its name when it is whole."""
    partial = path.with_suffix(".partial")
    with av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv444p"
        stream.options = {"crf": "4", "preset": "veryfast", "g": "24", "threads": "1"}
        for frame in range(len(sequence.rod)):
            picture = av.VideoFrame.from_ndarray(camera.draw(sequence, frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    partial.rename(path)


def write_states(path: Path, camera: Camera, sequence: Sequence) -> None:
    """Write what is where, as NumPy arrays.

    ``names`` (things) and ``colours`` (things, 3; red, green, blue from 0 to 1); for every frame ``places`` (frames,
    things, 3) and ``rod`` (frames, 3; its lower end) in metres, ``turns`` (frames, things, 4; quaternions), where the
    former are in the picture, ``places_pixels`` and ``rod_pixels`` (column, row), and ``pushing`` (frames).
    """
    rod = np.concatenate([sequence.rod, np.full((len(sequence.rod), 1), ROD_HEIGHT)], axis=1)
    names = [NAMES[kind] for kind in sequence.kinds]
    np.savez_compressed(
        path,
        names=np.array(names),
        colours=np.array([COLOURS[name] for name in names]),
        places=sequence.places,
        turns=sequence.turns,
        rod=rod,
        places_pixels=camera.pixels(sequence.places),
        rod_pixels=camera.pixels(rod),
        pushing=sequence.pushing,
    )


def make(out: Path, split: str, seeds: range, frames: int) -> Counter[str]:
    """Make the files of some sequences unless they are there; what was measured."""
    sequences = [simulate(seed, frames) for seed in seeds]
    camera = Camera()
    try:
        for seed, sequence in zip(seeds, sequences, strict=True):
            path = out / split / f"{seed:05d}.mp4"
            if split == "test":
                write_states(out / "states" / f"{seed:05d}.npz", camera, sequence)
            if not path.exists():
                write_video(path, camera, sequence)
    finally:
        camera.close()
    return Counter(
        sequences=len(seeds),
        frames=frames * len(seeds),
        pushing=sum(int(sequence.pushing.sum()) for sequence in sequences),
        simulations=sum(sequence.attempts for sequence in sequences),
    )


def main() -> None:
    """Make the data set, or a part of it."""
    parser = argparse.ArgumentParser(description="Render robot-push.")
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--split", choices=[*SPLITS, "all"], default="all", help="which part")
    parser.add_argument("--sequences", type=int, help="only so many of each part")
    arguments = parser.parse_args()
    began = time.perf_counter()
    (arguments.out / "states").mkdir(parents=True, exist_ok=True)
    totals: dict[str, Counter[str]] = {}
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for split in SPLITS if arguments.split == "all" else [arguments.split]:
            first, count, frames = SPLITS[split]
            (arguments.out / split).mkdir(exist_ok=True)
            last = first + min(count, arguments.sequences or count)
            parts = [range(seed, min(seed + AT_ONCE, last)) for seed in range(first, last, AT_ONCE)]
            work = [pool.submit(make, arguments.out, split, seeds, frames) for seeds in parts]
            total = totals[split] = sum((done.result() for done in work), Counter[str]())
            print(
                f"{split}: {total['sequences']} sequences, {total['frames']} frames; a thing is being pushed in "
                f"{total['pushing'] / total['frames']:.1%} of them; {total['simulations'] / total['sequences']:.2f} "
                f"simulations a sequence; {time.perf_counter() - began:.0f} s since the start",
                flush=True,
            )
    (arguments.out / "measured.json").write_text(json.dumps(totals, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
