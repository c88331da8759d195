"""Make the page that `asv publish` wrote work without a network: `offline.py FOLDER`.

asv's page takes jQuery, flot and bootstrap, which are under the MIT licence, from other hosts. Python packages ship
copies, pinned in the dependency group asv-page; what no package ships is a few lines each, in the folder dashboard.
"""

import re
import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path

HERE = Path(__file__).parent
TAG = re.compile(r'<(?:script src|link rel="stylesheet" href)="https://[^"]*?/([^"/]+)"[^>]*>')
PACKAGES = ("bootstrap", "jquery", "jquery_flot")  # js.bootstrap, js.jquery, js.jquery_flot
OURS = {"jquery.flot.orderBars.js": "bars.js", "stupidtable.min.js": "sort.js", "md5.min.js": "digest.js"}


def make_offline(page: Path) -> None:
    """Copy the libraries beside the page, into vendor, and point its tags there.

    Raises LookupError for a library that is in no package, as another version of asv may ask for.
    """
    vendor = page / "vendor"
    for name in PACKAGES:
        resources = Path(str(distribution(f"js.{name}").locate_file(f"js/{name}/resources")))
        shutil.copytree(resources, vendor / name, dirs_exist_ok=True)
    shutil.copytree(HERE / "dashboard", vendor / "dashboard", dirs_exist_ok=True)

    def local(tag: re.Match[str]) -> str:
        name = OURS.get(tag[1], tag[1])
        found = sorted(vendor.rglob(name))
        if len(found) != 1:
            raise LookupError(f"asv's page asks for {tag[1]}, of which {vendor} must have one copy, got {len(found)}")
        address = found[0].relative_to(page).as_posix()
        return f'<link rel="stylesheet" href="{address}">' if address.endswith(".css") else f'<script src="{address}">'

    index = page / "index.html"
    index.write_text(TAG.sub(local, index.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    make_offline(Path(sys.argv[1]))
