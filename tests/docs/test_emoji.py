"""docs/emoji.py on a package of the same layout, made here."""

import io
import json
import pathlib
import subprocess
import sys
import tarfile

from PIL import Image

RECORDS = [
    {"name": "DROPLET", "image": "1f4a7.png", "has_img_twitter": True},
    {"name": "NOT DRAWN", "image": "ffff.png", "has_img_twitter": False},
    {
        "name": "WAVING HAND",
        "image": "1f44b.png",
        "has_img_twitter": True,
        "skin_variations": {"1F3FD": {"image": "1f44b-1f3fd.png", "has_img_twitter": True}},
    },
]


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def test_the_pictures_are_laid_out_with_their_captions(tmp_path, root):
    picture = io.BytesIO()
    Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save(picture, "png")
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as archive:
        for name in ("1f4a7", "1f44b", "1f44b-1f3fd", "unnamed"):
            _add(archive, f"package/img/twitter/64/{name}.png", picture.getvalue())
        _add(archive, "package/emoji.json", json.dumps(RECORDS).encode())
    folder = tmp_path / "emoji"
    command = [sys.executable, root / "docs/emoji.py", folder, f"--archive={tmp_path / 'package.tgz'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("3 pictures")
    assert {path.stem: path.read_text(encoding="utf-8").strip() for path in pathlib.Path(folder).glob("*.txt")} == {
        "1f4a7": "droplet",
        "1f44b": "waving hand",
        "1f44b-1f3fd": "waving hand, medium skin",
    }
    assert {path.stem for path in folder.glob("*.png")} == {path.stem for path in folder.glob("*.txt")}
