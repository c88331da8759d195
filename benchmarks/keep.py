"""Keep a release's results among those that are committed: `keep.py MACHINE COMMIT`, after asv measured it.

asv names results by the interpreter's path, which says where someone's files are. Here it is the version instead, that
of the interpreter which runs this: take the one that asv ran.
"""

import json
import platform
import shutil
import sys
from pathlib import Path

from figures import FOLDER, KEPT, result_file


def keep(machine: str, commit: str, folder: Path = FOLDER, kept: Path = KEPT) -> Path:
    """Copy machine, benchmarks and results of a commit to `kept`; returns the path of its results."""
    source = result_file(folder, commit)
    if source.parent.name != machine:
        raise ValueError(f"the newest results of {commit[:8]} are of machine {source.parent.name!r}, not {machine!r}")
    content = json.loads(source.read_text(encoding="utf-8"))
    content["python"] = content["params"]["python"] = ".".join(platform.python_version_tuple()[:2])
    content["env_name"] = f"existing-py{content['python']}"
    target = kept / machine / f"{commit[:8]}-{content['env_name']}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content) + "\n", encoding="utf-8")
    shutil.copy(source.with_name("machine.json"), target.parent)
    shutil.copy(folder / "benchmarks.json", kept)
    return target


if __name__ == "__main__":
    print(keep(*sys.argv[1:3]))
