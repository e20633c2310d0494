"""06: reading, and repairing, a position that does not work.

    python examples/06_failed_position.py

Every error names the node or the argument, what was seen and expected, and the way out. In a search, a position that
fails is a value with a reason, and the others go on.
"""

import netclone
from netclone.demo import load_data, make_network, train_network

digits = load_data()
old, new = digits.training(tuple(range(7))), digits.training((7, 8, 9))
source, target = make_network("test_efficientnet", 10, seed=0), make_network("test_resnet", 7, seed=0)
train_network(source, digits.images, digits.labels, seed=0, epochs=2)
train_network(target, *old, seed=0, epochs=2)
traced = netclone.trace(target, digits.images[:2])


def shown(what: str, error: netclone.NetcloneError) -> None:
    """An error as a user reads it."""
    print(f"\n{what}\n  {type(error).__name__}: {error}")


# A misspelt position: the closest names are suggested.
try:
    netclone.position(traced, "layer22")
except netclone.PositionError as error:
    shown("A misspelt position.", error)

# A module that was only extracted has no adapter: it takes the source's features, and these are others.
mask = netclone.localize(source, method="magnitude", keep=0.5, example_inputs=digits.images[:2])
extracted = netclone.extract(source, mask, at="blocks.2", classes=[7, 8, 9], example_inputs=digits.images[:2])
try:
    netclone.inject(traced, extracted, at="layer2")
except netclone.AdapterError as error:
    shown("An extracted module where its input does not fit.", error)

# A cut inside a block, where a shortcut goes round it.
try:
    everything = netclone.localize(target, method="magnitude", keep=1.0, example_inputs=digits.images[:2])
    netclone.extract(target, everything, at="layer1.0.conv1", example_inputs=digits.images[:2])
except netclone.PositionError as error:
    shown("A cut that features go round.", error)

# The repair: let clone() fit an adapter. It searches positions, and says of each what came of it.
module = netclone.clone(
    source, target, [new], classes=[7, 8, 9], target_data=[old], search="all", distill_steps=30, epochs=8
)
print("\nThe search, deep to shallow:")
for candidate in module.spec.search:
    result = f"{candidate.score:.1%}" if candidate.score is not None else f"rejected: {candidate.reason}"
    print(f"  {candidate.at:10} source cut behind {candidate.source_at!s:12} {result}")
grafted = netclone.inject(traced, module)
scores = netclone.evaluate(grafted, [(digits.test_images, digits.test_labels)], reference=target)
print(f"\nGrafted at '{module.at}': old {scores.old:.1%}, new {scores.new:.1%}, all {scores.all:.1%}.")
assert scores.locality_closed == 0 and scores.all > 0.8
