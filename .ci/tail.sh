#!/usr/bin/env bash
# What must pass before main moves: lint, tests, and a tiny run of each script that no test runs.
set -euo pipefail
cd "$(dirname "$0")/.."


# What the tests have compiled by now, and what the scripts share.
export JAX_COMPILATION_CACHE_DIR=$PWD/.cache/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export out

tiny() { # MODULE [OPTION...]
    local name=$*
    .venv/bin/python -m "$1" "${@:2}" --tiny --out "$out/$name" >"$out/$name.log" 2>&1 || {
        echo "== $name --tiny failed"
        cat "$out/$name.log"
        return 1
    }
    echo "== $name --tiny ran in $SECONDS s"
}
export -f tiny

# The tests have run the --tiny of these.
tested='(permuted|rotated|nns|split_mnist|split_imagenet|report|none_of_these|benchmark_codecs)'
# A module without __main__ is one that scripts share. The longest begins first.
{
    echo tests.stress.stress_runs
    echo experiments.split_cifar
    grep -l '__main__' experiments/*.py tests/stress/*.py | sed 's/\.py$//; s#/#.#g' |
        grep -Ev "^experiments\.$tested\$|stress_runs|split_cifar"
} | xargs -P "$(nproc)" -I{} bash -c 'SECONDS=0; tiny {}'
echo "every script ran"
