"""The tutorials: docs/tutorials/*.py run as notebooks, outputs and all, with the seconds of each.

python docs/run_tutorials.py [NAME ...]
"""

import sys
import time
from pathlib import Path

import jupytext
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "tutorials"


def main(names):
    for path in sorted(FOLDER.glob("*.py")):
        if names and path.stem not in names:
            continue
        notebook, start = jupytext.read(path), time.monotonic()
        notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
        NotebookClient(notebook, timeout=None, record_timing=False).execute(cwd=str(FOLDER))
        for number, cell in enumerate(notebook.cells):
            cell.id, cell.metadata = f"cell{number}", {}
        notebook.metadata = {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        }
        path.with_suffix(".ipynb").write_text(jupytext.writes(notebook, fmt="ipynb") + "\n")
        print(f"{path.stem}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
