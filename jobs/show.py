"""reseg show"""

import click

from jobs._options import EPILOG, night_option, run


@click.command("show", epilog=EPILOG)
@click.argument("results")
@click.argument("image_id")
@click.option("-o", "--out", required=True, type=click.Path(), help="PNG file to write.")
@click.option("--force", is_flag=True, help="Overwrite the file if it is there.")
@night_option
def command(results: str, image_id: str, out: str, force: bool, night: int | None) -> None:
    """Draw IMAGE_ID with the outline of its mask, and of its reference if it has one.

    Reads the image from the source again, and refuses if it has changed since.
    """
    from io import BytesIO

    from jobs._options import check_out_file
    from pipeline import storage
    from pipeline.lookup import require_night, show_image

    place = check_out_file(out, force=force)
    picture = BytesIO()
    show_image(require_night(results, night), image_id).save(picture, "PNG")
    storage.write(place, picture.getvalue())
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    run(command)
