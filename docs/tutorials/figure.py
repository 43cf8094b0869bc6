# %% [markdown]
# # Reproduce a figure, and read its result
#
# The paper's figures are scripts in `experiments`, run from a clone. Figure 3 (left) is
# `permuted --preset mnist-250-lenet`, half an hour on two CPU cores and MNIST on disk. The same
# script runs on embedded digits within a minute; both write the same files.

# %%
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

root = Path.cwd().parents[1]  # the clone; this notebook is in docs/tutorials
out = Path(tempfile.mkdtemp()) / "run"

# %% [markdown]
# ## Run
#
# At a shell: `python -m experiments.permuted --tasks 12 --out runs/twelve`. Interrupted runs go on with
# `--resume`; `--help` lists the options.

# %%
command = [sys.executable, "-m", "experiments.permuted", "--tasks", "12", "--out", str(out)]
done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
print("\n".join(line[:110] for line in done.stdout.splitlines()[-12:]))

# %% [markdown]
# ## What a run leaves

# %%
print(sorted(path.name for path in out.iterdir()))
result = json.loads((out / "result.json").read_text())
print(sorted(result))

# %% [markdown]
# `result.json` holds config, seed, versions, seconds and bytes, and `rows`: one for each number of
# tasks learned, scenario, objective and protocol. GG is given the id; GNu names it, and a wrong task
# counts as wrong; `decisions` is how many inferences stand behind a task accuracy.

# %%
for row in result["rows"]:
    if row["tasks_learned"] == 12 and row["protocol"] in ("given", "per_example"):
        objective = row["objective"] or "-"
        found = "" if row["task_accuracy"] is None else f"  task {row['task_accuracy']:.4f}"
        print(f"{row['scenario']:4} {objective:12} {row['accuracy']:.4f}{found}")

# %% [markdown]
# ## The figure beside the paper
#
# `docs/results/results.json` has the rows of the runs that the project's tables stand on, the full
# Figure 3 among them, with the paper's numbers, digitised to about .0003.

# %%
entries = json.loads((root / "docs/results/results.json").read_text())["entries"]
wanted = {
    "experiment": "permuted",
    "dataset": "mnist",
    "model": "lenet_300_100",
    "outputs": 100,
    "method": "supsup",
}
curve = sorted(
    (entry["tasks"], entry["accuracy"], entry["paper"])
    for entry in entries
    if all(entry[name] == value for name, value in wanted.items())
    and (entry["scenario"], entry["objective"], entry["protocol"]) == ("gnu", "entropy", "paper")
)
for tasks, ours, paper in curve:
    print(f"{tasks:4} tasks: {ours:.4f}, paper {paper}")

# %%
plt.figure(figsize=(5, 3))
tasks, ours, paper = zip(*curve, strict=True)
plt.plot(tasks, ours, "o-", label="here")
plt.plot(tasks, paper, "x--", label="paper")
plt.ylim(0.92, 0.945)
plt.xlabel("tasks learned")
plt.ylabel("GNu accuracy, one gradient of H")
_ = plt.legend()

# %% [markdown]
# Reading it: the curve is flat, which is the point. No task is forgotten, and naming one among 250 by
# a single image is right in .9995 of the cases. [Results](../results/index.md) has the other figures,
# [Reproduce](../reproduce.md) their commands. `python -m experiments.report --runs runs --out report`
# gathers runs of your own into the same table.
