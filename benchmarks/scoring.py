"""P7: scoring 5 captioners × 1000 images beside COCO's evaluation code: `python -m benchmarks.scoring` (3 min)."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np

from benchmarks.measure import Row, in_turn, ratio, show
from benchmarks.references import cocoeval
from captioning.metrics.java import find_java
from captioning.metrics.scoring import METRICS, MetricScores, score_captioners

NAMES = [name for name in METRICS if name != "SPICE"]  # its models come in no package
NUM_IMAGES, NUM_CAPTIONERS, NUM_REFERENCES = 1000, 5, 5

# Choices stand between `|`; `/` parts words that METEOR may take for each other: by stem, synonym or paraphrase.
LOOKS = """young/little|big/large/huge|brown/tan|black|white|happy/smiling|wet/soaked|old/elderly|tall
    |red-haired|three-legged|small/tiny|barefoot|masked|tired/sleepy|bearded|muddy/dirty|grey/gray
    |blond/blonde|spotted|fat|thin/skinny|shirtless"""
WHO = """man/guy|men/guys|boy/kid|boys/kids|girl|girls|lady/woman|women|child|children/kids|baby/toddler
    |crowd/people|couple|player|players|skier|surfer|cyclist/biker|climber|skateboarder|musician|dancers
    |soldiers|worker/workman|waiter|runner|dog/puppy|dogs|cat/kitten|cats|horse|horses|bird|birds|cow
    |cattle/cows|sheep|elephant|elephants|goat|duck/ducks|monkey"""
DOES = """runs/running/is_running/jogs|sits/sitting/is_seated|jumps/jumping/leaps|stands/standing/is_standing
    |walks/strolls|plays/playing/is_playing|sleeps/is_asleep|looks_around/is_looking|climbs/climbing
    |rides/riding|swims/swimming|waits/is_waiting|eats/eating/is_eating|drinks/is_drinking|sings/singing
    |falls/falling/is_falling|slides/sliding|dances/is_dancing|fights/fighting|rests/resting/is_resting
    |poses/posing|digs/digging|paints/painting|laughs/laughing"""
WHERE = """on/in the grass/field|across/through a street/road|near/beside the lake/river/water
    |in_front_of a house/building|at/by the beach/shore|under a tree/trees
    |on_top_of a rock/hill/mountain|next_to a parked car/automobile|in a tent|inside a kitchen/room
    |over a fence/wall|in the middle/centre of a snowy park/garden|on a bench/seat|at the airport
    |on the sidewalk/pavement|in a crowded/busy market/shop|on stage|at a table/desk|by the window
    |on a wooden bridge/pier|in shallow water|along/down a narrow path/trail|behind a truck/lorry
    |outside a church|between two cars/vehicles"""
WITH = """with a red ball/toy|while holding/carrying an umbrella|wearing a blue shirt/t-shirt/jacket
    |, and others watch/look on|during/in the day|as the sun sets|that is n't his
    |with its owner's bicycle/bike|||||wearing a helmet/hat|at night/dusk
    |with a stick/branch in its mouth|beside/near another person/man|holding/with a camera
    |(left) with a guitar|for a photo|in the rain/snow|with two friends
    |while_talking on a phone/cellphone|with arms outstretched/raised|, number 12, alone"""
SCENE = [[" ".join(choice.split()) for choice in text.split("|")] for text in (LOOKS, WHO, DOES, WHERE, WITH)]


def synthetic_captions(seed: int = 0) -> tuple[list[list[str]], dict[str, list[str]]]:
    """Five references an image that describe one scene in different words, and captions that get part of it right."""
    draw = random.Random(seed)
    scenes = [_scene(draw) for _ in range(NUM_IMAGES)]
    references = [[_say(draw, _changed(draw, s, 0.15)) + " ." for _ in range(NUM_REFERENCES)] for s in scenes]
    captioners = {
        f"captioner {n}": [_say(draw, _changed(draw, scene, 0.2 + 0.1 * n)) for scene in scenes]
        for n in range(NUM_CAPTIONERS)
    }
    return references, captioners


def _scene(draw: random.Random) -> list[str]:
    return [draw.choice(choices) for choices in SCENE]


def _changed(draw: random.Random, scene: list[str], share: float) -> list[str]:
    return [other if draw.random() < share else part for part, other in zip(scene, _scene(draw), strict=True)]


def _say(draw: random.Random, scene: list[str]) -> str:
    words = [draw.choice(word.split("/")) for part in scene for word in part.split()]
    return " ".join([draw.choice(["A", "The", "One", "Some"]), *words]).replace("_", " ")


def measure_scoring() -> Row:
    """All metrics of all captioners: ours together, theirs one after the other, a process of METEOR for each."""
    references, captioners = synthetic_captions()
    os.environ["PATH"] += f"{os.pathsep}{find_java().parent}"  # for theirs, which takes what is called java
    found: dict[str, Any] = {}

    def ours() -> None:
        found["ours"] = score_captioners(NAMES, references, captioners, [range(NUM_IMAGES)])

    def one() -> None:
        name = next(iter(captioners))
        score_captioners(NAMES, references, {name: captioners[name]}, [range(NUM_IMAGES)])

    def theirs() -> None:
        found["theirs"] = {name: cocoeval.evaluate(references, captions) for name, captions in captioners.items()}

    times = in_turn({"ours": ours, "ours, one captioner": one, "COCOEvalCap": theirs}, repeats=2)
    differences = [_difference(found["ours"][name], found["theirs"][name]) for name in captioners]
    last = found["ours"]["captioner 0"]
    return {
        "work": f"P7 {NUM_CAPTIONERS} captioners, {NUM_IMAGES} images, {NUM_REFERENCES} references: {', '.join(NAMES)}",
        "times": times,
        "ratios": {
            "COCOEvalCap / ours": ratio(times, "COCOEvalCap", "ours"),
            "the same for one captioner": ratio(times, "COCOEvalCap", "ours, one captioner") / NUM_CAPTIONERS,
        },
        "check": {
            "numbers compared": NUM_CAPTIONERS * len(NAMES) * (1 + NUM_IMAGES),
            "greatest difference": max(differences),
            "first captioner": ", ".join(f"{name} {last[name].groups[0]:.3f}" for name in NAMES),
        },
    }


def _difference(ours: dict[str, MetricScores], theirs: cocoeval.Scores) -> float:
    """The greatest one over the scores of all images and of each."""
    return max(
        float(np.abs(np.array([*ours[name].images, *ours[name].groups]) - np.array([*each, total])).max())
        for name, (total, each) in theirs.items()
    )


if __name__ == "__main__":
    show(measure_scoring())
