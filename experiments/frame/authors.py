"""Times the authors' own code, in a clone of it and in an interpreter that has torch.

    cd DIR; python authors.py TASKS OUTPUTS BATCH REPEATS

Run by `experiments.benchmark_authors`; imports nothing of this project, nor JAX. Prints JSON.
"""

import contextlib
import io
import json
import os
import resource
import sys
import time

tasks, outputs, batch, repeats = map(int, sys.argv[1:])
sys.argv = sys.argv[:1]  # which their argument parser reads
sys.path.insert(0, os.getcwd())
STEPS = 100  # timed together, and told as 1,000

import torch  # noqa: E402
from args import args  # noqa: E402

# As in their experiments/GNu/MNISTPerm, but that all images of the batch decide.
args.set, args.model, args.conv_type = "MNISTPerm", "LeNet", "FastMultitaskMaskConv"
args.conv_init, args.num_tasks, args.output_size = "signed_constant", tasks, outputs
args.data_to_repeat, args.unshared_labels, args.device = batch, True, "cpu"

import adaptors  # noqa: E402
import utils  # noqa: E402
from models.small import LeNet  # noqa: E402


class OneBatch(list):
    """What their adaptors take for a loader."""

    dataset = range(batch)


torch.manual_seed(0)
model = LeNet()
model.apply(lambda module: setattr(module, "num_tasks_learned", tasks))
x, y = torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,))
loader = OneBatch([(x, y)])


def timed(call, repeats):
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def train():
    """As their main and trainers.default do, on a batch in memory."""
    model.apply(lambda module: setattr(module, "task", 0))
    scores = [p for name, p in model.named_parameters() if name.endswith("scores.0")]
    optimizer = torch.optim.RMSprop(scores, lr=1e-4)
    criterion = torch.nn.CrossEntropyLoss()
    for _ in range(STEPS):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()


def decide():
    # No task is the 'true' one, so that they predict nothing behind the decision.
    adaptors.se_oneshot_entropy_minimization(model, None, loader, tasks, -1)


with contextlib.redirect_stdout(io.StringIO()):  # their adaptors print
    model.apply(lambda module: setattr(module, "task", -1))
    with torch.no_grad():
        utils.cache_masks(model)
    seconds = {"decision": timed(decide, repeats)}
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds["task"] = [1000 / STEPS * value for value in timed(train, max(1, repeats // 3))]
print(json.dumps({"seconds": seconds, "peak_bytes": peak}))
