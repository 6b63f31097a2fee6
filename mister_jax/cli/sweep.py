"""Trains all points or random points of a hyperparameter grid, and ranks the points.

mister-jax sweep --config=fusion:DATASET --workdir=DIR --num_seeds=3
    --grid=optimizer.learning_rate=1e-4,3e-4,1e-3 --grid=model.context_dim=64,128
mister-jax sweep --config=fusion:DATASET --workdir=DIR --random=20 --seed=0
    --grid=optimizer.learning_rate=1e-4,3e-4,1e-3 --grid="model.kernel_sizes=(1),(1,3)"

The points are ranked by the validation score. The command writes `sweep.csv`, `sweep.json` and
`sweep.png`. The test split is scored only with --evaluate_test, and only for the point with the
best validation score. Run the command again to resume.
"""

from typing import Any

from absl import flags
from ml_collections import config_flags

from mister_jax.cli import cluster
from mister_jax.cli.app import STOPPED_BY_SIGTERM, required_config, required_workdir
from mister_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "config of the experiment", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the sweep; created if missing")
_GRID = flags.DEFINE_multi_string(
    "grid",
    [],
    "FIELD=VALUE,VALUE: a config field and its values; repeat the flag for more fields. Put values "
    "that contain commas in parentheses",
)
_NUM_SEEDS = flags.DEFINE_integer(
    "num_seeds", None, "seeds of each point; by default config.num_seeds", lower_bound=1
)
_RANDOM = flags.DEFINE_integer(
    "random", None, "number of random points of the grid; by default all points", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the random points", lower_bound=0)
_EVALUATE_TEST = flags.DEFINE_bool("evaluate_test", False, "score the best point on the test split")

_MAX_ROWS = 30


def _sweep() -> int:
    config = required_config(_CONFIG)
    workdir = required_workdir(_WORKDIR, "a directory; it is created if it does not exist")
    if config.task != "fusion":
        raise InputError(f"config.task={config.task!r}; allowed: 'fusion'")
    if not _GRID.value:
        raise InputError("--grid is needed, such as --grid=optimizer.learning_rate=1e-4,1e-3")
    if _NUM_SEEDS.value is not None:
        config.num_seeds = _NUM_SEEDS.value
    import jax

    from mister_jax.evaluation.sweep import FILES, parse_grid, run_sweep

    axes = [parse_grid(config, text) for text in _GRID.value]
    result = run_sweep(
        config,
        axes,
        workdir,
        num_random=_RANDOM.value,
        seed=_SEED.value,
        evaluate_test=_EVALUATE_TEST.value,
    )
    if result is None:
        return STOPPED_BY_SIGTERM
    if jax.process_index() == 0:
        _print_result(result)
        print(f"written to {workdir}: {', '.join(FILES)}")
    return 0


def _print_result(result: dict[str, Any]) -> None:
    """Prints the best points and the test scores."""
    from mister_jax.console import comparison_table, output_console
    from mister_jax.evaluation.sweep import Axis, format_score, format_value, short_names
    from mister_jax.metrics import SCORE_NAMES, title

    points = {
        f"{rank} best" if rank == 1 else f"{rank}": point
        for rank, point in enumerate(result["points"][:_MAX_ROWS], start=1)
    }
    axes = [Axis(field, ()) for field in result["fields"]]
    columns = {
        name: {rank: format_value(point["values"][axis.field]) for rank, point in points.items()}
        for name, axis in zip(short_names(axes), axes, strict=True)
    }
    ranking = result["score"]
    columns[title(ranking)] = {
        rank: format_score(point["validation"], ranking) for rank, point in points.items()
    }
    if len(result["points"][0]["seeds"]) > 1:
        columns["ensemble"] = {
            rank: f"{point['validation']['ensemble'][ranking]:.3f}"
            for rank, point in points.items()
        }
    console = output_console()
    seeds = result["points"][0]["seeds"]
    heading = f"{result['dataset']}: validation"
    if len(seeds) > 1:
        heading += f", mean (± standard deviation) of {len(seeds)} seeds"
    console.print(comparison_table(heading, columns))
    hidden = len(result["points"]) - len(points)
    if hidden:
        print(f"{hidden} more points are in sweep.csv")
    print(f"best on validation: {result['best']}")
    if "test" in result:
        scores = ", ".join(
            f"{title(name)} {format_score(result['test'], name)}" for name in SCORE_NAMES
        )
        print(f"test, best point only: {scores}")


main = cluster.distributed(_sweep, saves_on_sigterm=True)
