"""reseg explain"""

import click

from jobs._options import EPILOG, json_option, night_option, print_json, run


@click.command("explain", epilog=EPILOG)
@click.argument("results")
@click.argument("image_id")
@night_option
@json_option
def command(results: str, image_id: str, night: int | None, as_json: bool) -> None:
    """Tell where the mask of IMAGE_ID comes from: input, network, settings, code, run, part.

    Needs only RESULTS; the source and the bundle may be gone.
    """
    from pipeline.lookup import explain_image, require_night

    lineage = explain_image(require_night(results, night), image_id)
    if as_json:
        print_json(lineage)
        return
    for section, value in lineage.items():
        click.echo(f"{section}:")
        for line in _lines(value, "  "):
            click.echo(line)


def _lines(value: object, indent: str) -> list[str]:
    if isinstance(value, dict):
        lines = []
        for key, item in value.items():
            if isinstance(item, (dict, list)) and item:
                lines += [f"{indent}{key}:", *_lines(item, indent + "  ")]
            else:
                lines.append(f"{indent}{key}: {item}")
        return lines
    if isinstance(value, list):
        return [line for item in value for line in [*_lines(item, indent)]]
    return [f"{indent}{value}"]


if __name__ == "__main__":
    run(command)
