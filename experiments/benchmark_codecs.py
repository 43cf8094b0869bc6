"""Bytes of ResNet-50's masks at rest, and seconds to code one, by codec (paper section 4.1).

    python -m experiments.benchmark_codecs

Masks of ResNet-50 (10 outputs, 23.5 million weights) at the Erdos-Renyi densities of the paper's
SplitImageNet runs, s = 4, 8 and 16, and at 32, read from tests/golden. Random masks stand in for
learned ones: at a given number of kept weights a size does not depend on which they are, but for
xor-delta. For that, five masks are made from one by moving a tenth of each leaf's kept weights,
and the first is coded against the majority of the five, whose own bytes are not counted.

    indices      the row indices of csc16 alone, two bytes a kept weight
    csc16        whole, as the paper's codec would take
    enumerative, bitpack, xor-delta    whole, as supsup_jax.stores.codecs writes them
    bound        the information bound, the sum over leaves of log2 C(n, k) bits
    over bound   enumerative / bound - 1
    paper        all that its tasks take, statistics and more; its code counts no bytes

Expected, MB (10**6 bytes) of 100 tasks:

          s   indices   csc16   enumerative   bitpack   xor-delta   bound   paper
          4      40.9    51.6          19.4     293.4         5.1    19.2    65.5
          8      80.6    91.2          33.5     293.4         9.1    33.3   101.0
         16     159.1   169.8          56.6     293.4        16.0    56.2   195.2
         32     313.4   324.0          92.2     293.4        27.8    91.4       -

Writes benchmark_codecs.json and .md to --out, and ends with the tables. A minute on one CPU core.
Seconds are medians of side-by-side rounds.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import supsup_jax as ss
from experiments.frame import bench
from experiments.frame.run import UsageError, usage_errors, writable_folder, write_result
from supsup_jax.layout import Layout
from supsup_jax.stores import codecs

DENSITIES = Path(__file__).parent.parent / "tests" / "golden" / "er_density.json"
PAPER_MB = {("ResNet50", 4): 65.50, ("ResNet50", 8): 100.98, ("ResNet50", 16): 195.18}
TASKS = 100
RELATED, MOVED = 5, 0.1


@dataclasses.dataclass(frozen=True)
class Args:
    """Measures what masks take at rest, and how long they take to code."""

    s: tuple[int, ...] = (4, 8, 16, 32)
    """Erdos-Renyi budgets: 1, 2, 4, 8, 16 or 32; higher is denser."""
    rounds: int = 7
    seed: int = 0
    out: Path = Path("runs/benchmark_codecs")
    tiny: bool = False
    """GEMResNet18 (1.1 million weights) at s = 4, 2 rounds: seconds, to see that it runs."""


def kept_counts(network: str, s: int) -> tuple[Layout, dict[str, int]]:
    """The conv layers of a network of the paper, and the weights kept in each at budget s."""
    rows = json.loads(DENSITIES.read_text())[network]
    shapes = {}
    for row in rows:
        outputs, inputs, height, width = row["shape_oihw"]
        shapes[row["name"]] = height, width, inputs, outputs
    leaves = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    kept = {row["name"]: ss.kept_count(row[f"s{s}"], math.prod(row["shape_oihw"])) for row in rows}
    return Layout.of(leaves, lambda name, leaf: True), kept


def random_mask(
    rng: np.random.Generator, layout: Layout, kept: dict[str, int]
) -> dict[str, np.ndarray]:
    """So many weights of each leaf, any as likely as any other."""
    mask = {}
    for name, shape in layout.shapes.items():
        flat = np.zeros(math.prod(shape), bool)
        flat[rng.choice(flat.size, kept[name], replace=False)] = True
        mask[name] = flat.reshape(shape)
    return mask


def related_mask(
    rng: np.random.Generator, mask: dict[str, np.ndarray], moved: float
) -> dict[str, np.ndarray]:
    """The mask with that part of each leaf's kept weights exchanged for others."""
    related = {}
    for name, leaf in mask.items():
        flat = leaf.reshape(-1).copy()
        kept, dropped = np.flatnonzero(flat), np.flatnonzero(~flat)
        count = round(moved * len(kept))
        flat[rng.choice(kept, count, replace=False)] = False
        flat[rng.choice(dropped, count, replace=False)] = True
        related[name] = flat.reshape(leaf.shape)
    return related


def measure(network: str, s: int, rounds: int, seed: int) -> dict:
    """One row: every codec at this budget."""
    layout, kept = kept_counts(network, s)
    rng = np.random.default_rng(seed)
    parent = random_mask(rng, layout, kept)
    masks = [related_mask(rng, parent, MOVED) for _ in range(RELATED)]
    mask = masks[0]
    base = {name: np.mean([each[name] for each in masks], axis=0) > 0.5 for name in mask}
    measures, coded = {}, {}
    for codec in codecs.CODECS:
        against = base if codec == codecs.DELTA else None
        coded[codec] = codecs.encode(mask, codec, against)
        measures["encode", codec] = functools.partial(codecs.encode, mask, codec, against)
        measures["decode", codec] = functools.partial(codecs.decode, coded[codec], layout, against)
    seconds = bench.medians(measures, rounds)
    sizes = codecs.coded_bytes(mask)
    assert sizes.csc16 is not None  # no layer of these networks has more rows than it can count
    num_bytes: dict[str, float] = {codec: len(one) for codec, one in coded.items()}
    num_bytes |= {"csc16": sizes.csc16, "indices": sizes.csc16_indices, "bound": sizes.bound}
    return {
        "s": s,
        "kept": sum(kept.values()),
        "mb": {name: TASKS * size / 1e6 for name, size in num_bytes.items()},
        "paper_mb": PAPER_MB.get((network, s)),
        "over_bound": num_bytes["enumerative"] / sizes.bound - 1,
        "encode_seconds": {codec: seconds["encode", codec] for codec in codecs.CODECS},
        "decode_seconds": {codec: seconds["decode", codec] for codec in codecs.CODECS},
    }


def markdown(result: dict) -> str:
    sizes = ("indices", "csc16", "enumerative", "bitpack", codecs.DELTA, "bound")
    lines = [
        f"{result['network']}, {result['weights']:,} weights: MB of {TASKS} tasks' masks.",
        "",
        f"| s | kept | {' | '.join(sizes)} | over bound | paper |",
        "|---" * (len(sizes) + 4) + "|",
    ]
    for row in result["rows"]:
        cells = [f"{row['mb'][name]:.1f}" for name in sizes]
        paper = "-" if row["paper_mb"] is None else f"{row['paper_mb']:.1f}"
        lines.append(
            f"| {row['s']} | {row['kept']:,} | {' | '.join(cells)} | {row['over_bound']:.2%} "
            f"| {paper} |"
        )
    lines += [
        "",
        f"Seconds to encode / decode one mask, medians of {result['rounds']} rounds, "
        f"{result['device']}.",
        "",
        f"| s | {' | '.join(codecs.CODECS)} |",
        "|---" * (len(codecs.CODECS) + 1) + "|",
    ]
    for row in result["rows"]:
        cells = [
            f"{row['encode_seconds'][codec]:.3f} / {row['decode_seconds'][codec]:.3f}"
            for codec in codecs.CODECS
        ]
        lines.append(f"| {row['s']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(args: Args) -> dict:
    network = "GEMResNet18" if args.tiny else "ResNet50"
    budgets, rounds = ((4,), 2) if args.tiny else (args.s, args.rounds)
    with usage_errors():
        if not budgets or not set(budgets) <= {1, 2, 4, 8, 16, 32}:
            raise UsageError(f"--s must be of 1, 2, 4, 8, 16 and 32, got {budgets}")
        if rounds < 1:
            raise UsageError(f"--rounds must be at least 1, got {rounds}")
        writable_folder(args.out)
    rows = [measure(network, s, rounds, args.seed) for s in budgets]
    result = write_result(
        args.out / "benchmark_codecs.json",
        network=network,
        weights=kept_counts(network, budgets[0])[0].num_weights,
        masks=f"random; xor-delta: {RELATED} with {MOVED:.0%} of one mask's kept weights moved",
        tasks=TASKS,
        rounds=rounds,
        seed=args.seed,
        rows=rows,
    )
    (args.out / "benchmark_codecs.md").write_text(markdown(result))
    print(markdown(result), end="")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
