"""`cosettle-cache demo`: the whole path on the built-in clips."""

from __future__ import annotations

from pathlib import Path

from cosettle_cache.cli.options import Quiet
from cosettle_cache.cli.recipes import Recipe, check_expectations, read_recipe
from cosettle_cache.cli.run import run_steps
from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import CheckpointError, ExitCode

#: The recipe of the demo, in a checkout; an installed package has no recipes.
RECIPE = Path(__file__).parents[2] / "pipelines" / "sprites.toml"


def demo(quiet: Quiet = False) -> int:
    """Extract, train and propagate on the built-in sprites clips; two minutes on two CPU cores.

    Example: cosettle-cache demo
    """
    talk = Talk(quiet=quiet)
    recipe = _with_best_weights(read_recipe(RECIPE), talk)
    code = run_steps(recipe, talk)
    if code:
        return code
    talk.result("pictures: demo/sprites/curves.png and demo/propagated/overlays")
    for outcome in check_expectations(recipe):
        kept = "as expected" if outcome.met else f"expected {outcome.expectation.value:.4f}"
        talk.note(f"{outcome.expectation.tokens} {outcome.expectation.metric} {outcome.measured:.4f}, {kept}")
    return int(ExitCode.DONE)


def _with_best_weights(recipe: Recipe, talk: Talk) -> Recipe:
    """Return the recipe with published weights where the hub can be reached, else as it is: seeded random.

    A demo that was run before keeps the weights it had.
    """
    from cosettle_cache.encoders import load_backbone

    name = recipe.option("backbone")
    if (before := _earlier_weights(Path(recipe.option("features")))) is not None:
        talk.note(f"encoder: {name} with the weights of the earlier demo ({before})")
        return recipe if before == recipe.option("weights") else recipe.without_option("weights")
    try:
        load_backbone(name)
    except CheckpointError as error:
        talk.note(f"encoder: {name} with seeded random weights ({error.message})")
        return recipe
    talk.note(f"encoder: {name} with its published weights")
    return recipe.without_option("weights")


def _earlier_weights(features: Path) -> str | None:
    """Return which weights an existing store was made with, None where there is none."""
    if not features.exists():
        return None
    from cosettle_cache.store import open_store

    return open_store(features).encoder["weights_argument"] or "published"
