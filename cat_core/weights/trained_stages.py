"""What a weights file's header says of its training: stage after stage, for its model card."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

KEY = "training"  # of the header

TrainedStage = dict[str, Any]  # see tools/official/model_card.py for what is read of it


def of_header(metadata: Mapping[str, str]) -> list[TrainedStage]:
    """The stages that a header tells of, the earliest first; none where it cannot be read."""
    try:
        stages = json.loads(metadata.get(KEY, "[]"))
    except (ValueError, RecursionError):
        return []
    if not isinstance(stages, list):
        return []
    return [stage for stage in stages if isinstance(stage, dict)]


def header(stages: Sequence[TrainedStage]) -> dict[str, str]:
    """What a header tells of stages; nothing where there is none."""
    return {KEY: json.dumps(list(stages))} if stages else {}


def of_parts(stages: Iterable[TrainedStage], parts: Iterable[str]) -> list[TrainedStage]:
    """The stages that trained one of some parts, each once."""
    wanted = set(parts)
    chosen: list[TrainedStage] = []
    for stage in stages:
        trained = stage.get("parts")
        is_wanted = isinstance(trained, list) and wanted.intersection(map(str, trained))
        if is_wanted and stage not in chosen:
            chosen.append(stage)
    return chosen
