"""folder(root, names): pictures for tests, in a folder for each class."""

from PIL import Image

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "grey": (90, 90, 90)}


def folder(root, names, count=3):
    """A folder of pictures for each name; those of a colour's name are of that colour."""
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(count):
            picture = Image.effect_noise((40 + number, 36), 60).convert("RGB")
            colour = Image.new("RGB", picture.size, COLOURS.get(name, (10, 20, 30)))
            Image.blend(picture, colour, 0.7).save(root / name / f"{number}.png")
    return str(root)
