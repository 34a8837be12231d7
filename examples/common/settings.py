"""Keeps a JSON of every setting beside what was made with it, and refuses to go on with others.

python settings.py FILE [--replace] NAME...        (the settings' names; their values are environment variables)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from corpus import InputError, writing

# may change when a run goes on: they do not decide what comes out, or only how far it goes
FREE = {"DATA", "RUN", "WORKERS", "GPUS", "NODES", "NODE_RANK", "MASTER", "MAX_TOKENS", "SAVE_UPDATES", "EPOCHS"}
FOLDERS = {"RAW", "DATA", "RUN"}


def main() -> None:
    path, names = Path(sys.argv[1]), [name for name in sys.argv[2:] if name != "--replace"]
    settings = {name: os.path.realpath(os.environ[name]) if name in FOLDERS else os.environ[name] for name in names}
    if path.exists() and "--replace" not in sys.argv:
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            sys.exit(f"error: {path} is not what was written there ({error}); remove {path.parent}")
        changed = [name for name in names if name not in FREE and before.get(name) != settings[name]]
        if changed:
            what = ", ".join(f"{name}={settings[name]} (was {before.get(name)})" for name in changed)
            sys.exit(f"error: {path.parent} was begun with other settings: {what}; choose another folder, or remove it")
    with writing(path) as (out,):
        out.write(json.dumps(settings, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
