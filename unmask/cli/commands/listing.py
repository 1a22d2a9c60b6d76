"""``unmask list`` and ``unmask info``."""

from __future__ import annotations

from typing import Annotated

import typer

from unmask.cli import speech


def register(app: typer.Typer) -> None:
    app.command("list")(list_command)
    app.command("info")(info_command)


def list_command(
    verb: Annotated[
        str | None, typer.Option(help="Only systems of this verb: train, predict, generate, compress, explain.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="The cards as JSON.")] = False,
) -> None:
    """The published systems that are installed.

    Example: [bold]unmask list --verb train[/bold]
    """
    import unmask

    cards = unmask.list_systems(verb)
    if json:
        speech.as_json([card.plain() for card in cards])
        return
    if not cards:
        speech.say(f"no installed system serves the verb {verb} yet")
        return
    rows = [(c.slug, c.room, c.verb if c.entry else "", c.year or "", c.hides or c.title) for c in cards]
    speech.table(("system", "room", "verb", "year", "hides"), rows)
    speech.say("\nmore about one: unmask info " + cards[0].slug)


def info_command(
    system: Annotated[str, typer.Argument(metavar="SYSTEM", help="A name from `unmask list`.")],
    json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """What one system is: paper, what it hides and predicts, recipes, every option.

    Example: [bold]unmask info mae[/bold]
    """
    import unmask

    facts = unmask.info(system)
    if json:
        speech.as_json(facts)
        return
    who = ", ".join(filter(None, [facts["authors"], facts["venue"], str(facts["year"] or "")]))
    speech.result(f"{facts['slug']}: {facts['title']}\n{who}")
    lines = [
        ("paper", facts["paper"]),
        ("hides", facts["hides"]),
        ("predicts", facts["predicts"]),
        ("backbones", ", ".join(facts["suggests"] or facts["backbones"])),
        ("checked against", facts["reference"]),
        (
            "original code",
            " ".join(filter(None, [facts["original"], f"({facts['licence']})" if facts["licence"] else ""])),
        ),
    ]
    lines += [("we decided", choice) for choice in facts["decided"]]
    if facts.get("claim"):
        lines.append(("claim", " ".join(str(facts["claim"].get("statement", "")).split())))
    speech.result("")
    speech.table(("", ""), [row for row in lines if row[1]])
    if facts["recipes"]:
        speech.result("")
        speech.table(("recipe", "what it is"), facts["recipes"].items())
    asked = f"option of {facts['asked_by']}"
    for head, some in (("option", "options"), ("option of its data", "data_options"), (asked, "asks")):
        if facts[some]:
            speech.result("")
            rows = [(o["name"], _shown(o["default"]), o["description"]) for o in facts[some]]
            speech.table((head, "default", "meaning"), rows)
    if facts.get("verb") == "compress":
        speech.say(f"\ntry: unmask compress MODEL --method {system} --data URI --budget macs=0.6 -o smaller/")
    elif facts["recipes"]:
        speech.say(
            f"\ntry: unmask train {system}        options go behind it: unmask train {system} {_example(facts['options'])}"
        )


def _shown(value: object) -> object:
    return "(open)" if value is None else value


def _example(options: list[dict[str, object]]) -> str:
    for option in options:
        if isinstance(option["default"], float):
            return f"{option['name']}={option['default']}"
    return "key=value"
