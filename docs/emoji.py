"""Lays out a folder of captioned pictures to try "Your own pictures" on: Twemoji's emoji, by name.

    python docs/emoji.py DIR                 # needs npm; downloads 59 MiB
    python docs/emoji.py DIR --archive=FILE  # the same from a package that is already here

The pictures come from the npm package emoji-datasource-twitter 16.0.0 (data and packaging under the
MIT licence; the pictures themselves are Twemoji, copyright Twitter, Inc. and other contributors,
under CC-BY 4.0: https://creativecommons.org/licenses/by/4.0/). Each is a 64 x 64 PNG with
transparency, written as DIR/NAME.png with its caption in DIR/NAME.txt. Running it again gives the
same files.
"""

import argparse
import json
import pathlib
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator

PACKAGE = "emoji-datasource-twitter@16.0.0"
PICTURES = "package/img/twitter/64/"
SKIN_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}


def captions(records: list[dict]) -> Iterator[tuple[str, str]]:
    """Yields (file name of the picture, caption) for every emoji and skin tone that has a picture."""
    for record in records:
        name = record["name"].lower()
        if record["has_img_twitter"]:
            yield record["image"], name
        for tones, variation in record.get("skin_variations", {}).items():
            if variation["has_img_twitter"]:
                words = " and ".join(dict.fromkeys(SKIN_TONES[tone] for tone in tones.split("-")))
                yield variation["image"], f"{name}, {words} skin"


def lay_out(archive: pathlib.Path, folder: pathlib.Path) -> int:
    """Writes the pictures and captions of the npm package `archive` to `folder`; returns their number."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as package:
        names = dict(captions(json.load(package.extractfile("package/emoji.json"))))
    count = 0
    with tarfile.open(archive) as package:
        for member in package:  # in the order of the archive: going back in it means reading it again
            name = member.name.removeprefix(PICTURES)
            if member.isfile() and name in names:
                (folder / name).write_bytes(package.extractfile(member).read())
                (folder / name).with_suffix(".txt").write_text(names[name] + "\n", encoding="utf-8")
                count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--archive", type=pathlib.Path, help=f"{PACKAGE} as `npm pack` fetched it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        archive = args.archive
        if archive is None:
            done = subprocess.run(["npm", "pack", PACKAGE, "--json"], cwd=temporary, capture_output=True, check=True)
            archive = pathlib.Path(temporary) / json.loads(done.stdout)[0]["filename"]
        count = lay_out(archive, args.folder)
    print(f"{count} pictures with their captions in {args.folder}")


if __name__ == "__main__":
    main()
