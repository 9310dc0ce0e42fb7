"""reseg bundle"""

from typing import Any

import click

from jobs._options import EPILOG, json_option, print_json, run


@click.group("bundle", epilog=EPILOG)
def command() -> None:
    """Trained networks: architecture, weights, labels and recipe in one folder, under one digest."""


@command.command("import", epilog=EPILOG)
@click.argument("weights")
@click.argument("out")
@click.option("--from", "layout", type=click.Choice(["buda", "milesial", "article"]), required=True)
@click.option("--recipe", help="buda-lgg, milesial or unit-range; default: the layout's own.")
@click.option("--label", "labels", multiple=True, help="Name of label 1, 2, …, in order.")
@click.option("--name", help="Name of the bundle; default: the file's.")
@json_option
def import_(weights: str, out: str, layout: str, as_json: bool, **options: Any) -> None:
    """Make a bundle OUT of a published file of WEIGHTS (.pt, .pth).

    The file is opened in a child process, as tensors only; anything else in it is refused.
    """
    from pipeline.bundle import import_weights

    bundle = import_weights(layout, weights, out, **options)
    if as_json:
        print_json({"bundle": bundle.uri, "digest": bundle.digest, "labels": bundle.labels})
        return
    click.echo(f"bundle {bundle.name} in {bundle.uri}, digest {bundle.digest[:16]}")


@command.command("show", epilog=EPILOG)
@click.argument("bundle")
def show(bundle: str) -> None:
    """Print what BUNDLE is, as JSON."""
    from dataclasses import asdict

    from pipeline.bundle import load_bundle

    loaded = load_bundle(bundle)
    print_json({**asdict(loaded), "recipe": loaded.recipe.to_plain()})


@command.command("verify", epilog=EPILOG)
@click.argument("bundle")
def verify(bundle: str) -> None:
    """Load BUNDLE whole: digests, names, shapes, finite weights."""
    from pipeline.bundle import load_bundle, verify_bundle

    loaded = load_bundle(bundle)
    click.echo(
        f"{loaded.uri} is whole: {verify_bundle(loaded):,} parameters, digest {loaded.digest[:16]}"
    )


if __name__ == "__main__":
    run(command)
