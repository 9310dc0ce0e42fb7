"""reseg verify"""

import click

from jobs._options import EPILOG, device_option, json_option, night_option, print_json, run


@click.command("verify", epilog=EPILOG)
@click.argument("results")
@click.option("--sample", type=click.IntRange(1), help="Compute so many images again.")
@click.option("--checksums", is_flag=True, help="Read every part and manifest that is kept.")
@click.option("--bundle", metavar="FOLDER", help="The night's network, if it has moved.")
@click.option("--seed", default=0, show_default=True, help="Another sample for another number.")
@night_option
@device_option
@json_option
def command(
    results: str,
    sample: int | None,
    checksums: bool,
    night: int | None,
    as_json: bool,
    **options: str,
) -> None:
    """Prove what is published: --sample N masks computed again are the same bits; --checksums of all.

    --sample reads SOURCE and bundle where the night found them. Exit code 1 if anything differs.
    """
    from jobs._summary import print_verified
    from pipeline.errors import ConfigError, VerificationError
    from pipeline.proof import verify_results
    from pipeline.telemetry import Progress

    if sample is None and not checksums:
        raise ConfigError("say what to verify: --sample 50, --checksums, or both")
    progress = Progress(quiet=as_json)
    try:
        proof = verify_results(
            results,
            night,
            sample=sample or 0,
            checksums=checksums,
            bundle=options["bundle"],
            device=options["device"] or "auto",
            seed=int(options["seed"]),
            progress=progress,
        )
    finally:
        progress.close()
    print_json(proof.to_plain()) if as_json else print_verified(proof)
    if not proof.holds:
        raise VerificationError(proof.sentence)


if __name__ == "__main__":
    run(command)
