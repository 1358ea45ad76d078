"""How many malformed inputs the tables hold."""

from malformed import annotations, checkpoints, commands, configs, images

ROWS = {
    "annotation files": len(annotations.KINDS) * (len(annotations.RAW) + len(annotations.PLACES))
    + len(annotations.FIELDS)
    + len(annotations.TRUTHS)
    + len(annotations.ANSWERS),
    "images and label maps": len(images.BROKEN) + len(images.PLACES) + len(images.MAPS),
    "settings, sizes and recipes": sum(
        map(len, (configs.RAW, configs.SETTINGS, configs.OF_TASKS, configs.MODELS, configs.RECIPES))
    ),
    "checkpoints": len(checkpoints.FILES)
    + len(checkpoints.STATES)
    + len(checkpoints.SAFETENSORS)
    + len(checkpoints.DESCRIPTIONS)
    + len(checkpoints.DESCRIPTION_FILES),
    "commands": len(commands.REFUSED) + len(commands.MISUSED) + len(commands.PUBLISHED),
}
"""Kind of input -> rows, each of which is refused by a test; what only looks wrong is not counted."""


def test_the_tables_are_long() -> None:
    assert sum(ROWS.values()) >= 800
    assert min(ROWS.values()) >= 30
