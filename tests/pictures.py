"""Small picture files, for tests."""

from PIL import Image


def picture(path, size=(40, 30), colour="red", mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def mask(path, size=(40, 30), box=(10, 5, 30, 20), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = Image.new("L", size)
    if box:
        drawn.paste(255, box)
    drawn.convert(mode).save(path)
    return path


def cut(path, keep=0.5):
    """Cut a file short."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
