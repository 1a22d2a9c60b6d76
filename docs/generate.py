"""Pages that are made when the docs are built, from what the package itself says: a mkdocs hook.

- ``systems/index.md`` and one page a system: card, docstrings, options, recipes, claim, results;
- ``reference/cli.md``: every command from its own help;
- ``reference/options.md``: training and data settings; ``reference/auto.md``: the rules of ``--recipe auto``.

Nothing is written into the tree: the pages exist in the build only.
"""

from __future__ import annotations

import ast
import importlib.util
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
PICTURES = ROOT / "docs" / "pictures"
sys.path.insert(0, str(ROOT))

from unmask import catalog  # noqa: E402
from unmask.reports.tables import is_backbone, results, systems_table  # noqa: E402

log = logging.getLogger("mkdocs.hooks.generate")


def on_config(config: Any) -> Any:
    """Put one page a system into the navigation."""
    pages = [f"systems/{c.slug}.md" for c in catalog.list_systems()]
    for section in config.nav:
        if isinstance(section, dict) and "Systems" in section:
            section["Systems"] = [{"Overview": "systems/index.md"}, *pages]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages and the figures of the results."""
    for path, text in pages():
        files.append(File.generated(config, path, content=text))
    for figure in [*RESULTS.glob("*.svg"), *RESULTS.glob("*.png")]:
        files.append(File.generated(config, f"systems/{figure.name}", abs_src_path=str(figure)))
    return files


def pages() -> Iterator[tuple[str, str]]:
    """(path, Markdown) of every generated page."""
    yield "systems/index.md", systems_page()
    shown = results(RESULTS)
    for card in catalog.list_systems():
        yield f"systems/{card.slug}.md", system_page(card, shown.get(card.slug))
    yield "reference/cli.md", cli_page()
    yield "reference/options.md", options_page()
    yield "reference/auto.md", auto_page()


# --- systems ----------------------------------------------------------------------------------------------------


def systems_page() -> str:
    return (
        "# Systems\n\nEvery system is one folder with its card, its model, its recipes and its claim. "
        "A claim is *shown* when the method beats its baselines over at least three seeds at the stated scale; "
        "*not shown* is an honest answer and stands here like the others.\n\n"
        f"{systems_table(RESULTS, link='{slug}.md')}"
    )


def system_page(card: Any, result: dict[str, Any] | None) -> str:
    """Card, what its docstring teaches, recipes, options, claim and what was measured."""
    parts = [f"# {card.slug}\n\n*{card.title}*"]
    facts = [
        ("Authors", ", ".join(str(x) for x in (card.authors, card.venue, card.year or "") if x)),
        ("Paper", f"[arXiv:{card.arxiv}]({card.paper})" if card.arxiv else ""),
        ("Hides", card.hides),
        ("Predicts", card.predicts),
        ("Needs", {"can_drop": "a backbone that drops hidden tokens", "can_replace": "a backbone that replaces hidden tokens"}
         .get(card.needs, card.needs)),
        ("Backbones", ", ".join(f"`{n}`" for n in (card.suggests or card.backbones))),
        ("Checked against", card.reference),
        ("Original code", f"{card.original}{f' ({card.licence})' if card.licence else ''}" if card.original else ""),
    ]  # fmt: skip
    parts.append("| | |\n| --- | --- |\n" + "".join(f"| {k} | {cell(v)} |\n" for k, v in facts if v))
    picture = next((p for p in (PICTURES / f"{card.slug}.png", PICTURES / f"{card.slug}.svg") if p.is_file()), None)
    if picture:
        parts.append(f"![Pictures that {card.slug} made](../pictures/{picture.name})")
    parts += [docstrings(card), use(card), recipes(card.slug), options(card), claim(card, result)]
    if card.decided:
        parts.append("## What the paper leaves open\n\nWe decided:\n\n" + "".join(f"- {d}\n" for d in card.decided))
    return "\n\n".join(p for p in parts if p) + "\n"


def use(card: Any) -> str:
    if card.verb == "train" and not is_backbone(card):
        return (
            f"## Use it\n\n```sh\nunmask train {card.slug} --data photos/\nunmask train {card.slug} --recipe tiny\n```"
        )
    if is_backbone(card) and card.suggests:
        return f"## Use it\n\n```sh\nunmask train simmim --backbone {card.suggests[0]} --data photos/\n```"
    return ""


def docstrings(card: Any) -> str:
    """The docstrings of the module and the class that the card names, read without importing them."""
    module, _, name = (card.entry or card.build).partition(":")
    spec = importlib.util.find_spec(module) if module else None
    if spec is None or not spec.origin:
        return ""
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    found = [ast.get_docstring(tree)]
    found += [ast.get_docstring(n) for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    return "\n\n".join(as_markdown(d) for d in found if d)


def recipes(slug: str) -> str:
    import yaml

    found = catalog.recipes(slug)
    if not found:
        return ""
    text = "## Recipes\n"
    for name, values in found.items():
        about = str(values.get("about", "")).strip()
        rest = {k: v for k, v in values.items() if k != "about"}
        written = yaml.safe_dump(rest, sort_keys=False, default_flow_style=None, allow_unicode=True, width=72)
        text += f"\n### {name}\n\n{about[:1].upper()}{about[1:]}.\n\n```yaml\n{written}```\n"
    return text


def options(card: Any) -> str:
    """Every option of a system, by importing it."""
    if not card.entry:
        return ""
    try:
        from unmask.api.catalogue import options as rows_of

        rows = rows_of(card.load().Config)
    except Exception as error:  # a system that cannot be imported must not take the whole documentation with it
        log.warning("the options of %s are left out: %s", card.slug, error)
        return ""
    lines = [f"| `{r['name']}` | {cell(written(r['default']))} | {cell(r['description'])} |" for r in rows]
    return "\n".join(["## Options", "", "Written behind the command: `key=value`.", "", *HEAD, *lines])


HEAD = ("| Option | Default | Meaning |", "| --- | --- | --- |")


def claim(card: Any, result: dict[str, Any] | None) -> str:
    """What the paper says that can be shown small, and what came out."""
    import yaml

    path = card.beside("claim.yaml")
    if path is None:
        return ""
    said = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    text = f"## Claim\n\n> {said.get('statement', '')}\n\n"
    text += f"{said['source'][:1].upper()}{said['source'][1:]}.\n\n" if said.get("source") else ""
    text += f"```sh\nunmask reproduce {card.slug} --tier tiny\n```\n"
    if result is None:
        return text + "\nIt has not been run yet.\n"
    seeds = f" over {len(result['seeds'])} seeds" if isinstance(result.get("seeds"), list) else ""
    tier = f" at tier {result['tier']}{seeds}" if result.get("tier") else ""
    text += f"\n**{str(result['verdict']).capitalize()}**{tier}"
    text += f" ({result['rule']}).\n" if result.get("rule") else ".\n"
    for key in ("budget", "about"):
        if result.get(key):
            text += f"\n{result[key][:1].upper()}{result[key][1:].rstrip('.')}.\n"
    primary = [c for c in result.get("comparisons") or [] if c.get("primary", True)]
    text += "\n" + "".join(f"- {sentence(c)}\n" for c in primary) if primary else ""
    for name, words in ((card.slug, "Every arm of the claim with its seeds"), (f"{card.slug}-cost", "What it costs")):
        figure = next((p for p in (RESULTS / f"{name}.svg", RESULTS / f"{name}.png") if p.is_file()), None)
        text += f"\n![{words}]({figure.name})\n" if figure else ""
    return text


def sentence(c: dict[str, Any]) -> str:
    numbers = f"{c.get('mean', 0):+.2f} [{c.get('low', 0):+.2f}, {c.get('high', 0):+.2f}], p = {c.get('p', 1):.3g}"
    return f"{c.get('method')} against {c.get('baseline')}, {c.get('metric')}: {numbers}"


# --- reference --------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """Every command: what it does, its example, its arguments and options."""
    head = "# Command line\n\nstdout is the result (`--json` where a program reads it), stderr is the talk. "
    head += "Whatever a user can mend is said in one line and leaves with exit code 2.\n"
    if importlib.util.find_spec("unmask.cli.app") is None:
        return head + "\nThe command line is not built yet.\n"
    try:
        import typer

        from unmask.cli.app import app

        group: Any = typer.main.get_command(app)
    except Exception as error:
        log.warning("the page of the command line is empty: %s", error)
        return head
    return head + "".join(
        command_section(name, command) for name, command in group.commands.items() if not command.hidden
    )


def command_section(name: str, command: Any) -> str:
    text, _, example = plain(command.help or "").partition("Example:")
    out = f"\n## unmask {name}\n\n{text.strip()}\n"
    if example.strip():
        out += f"\n```sh\n{' '.join(example.split())}\n```\n"
    rows = [row for parameter in command.params if (row := parameter_row(parameter))]
    return out + ("\n| | Default | |\n| --- | --- | --- |\n" + "".join(rows) if rows else "")


def parameter_row(parameter: Any) -> str:
    if getattr(parameter, "hidden", False) or parameter.name == "help":
        return ""
    argument = parameter.param_type_name == "argument"
    names = [parameter.metavar or parameter.name.upper()] if argument else [*parameter.opts, *parameter.secondary_opts]
    shown = ", ".join(f"`{n}`" for n in names)
    default = (
        "required" if parameter.required else written(parameter.default) if parameter.default not in (None, ()) else ""
    )
    if callable(parameter.default) or "Sentinel" in str(parameter.default):
        default = "required" if parameter.required else ""
    if parameter.default is False:
        default = ""
    return f"| {shown} | {cell(default)} | {cell(plain(getattr(parameter, 'help', '') or ''))} |\n"


def options_page() -> str:
    """Training and data settings with their defaults."""
    text = "# Options of training and data\n\nWritten behind the command as `train.KEY=value` and `data.KEY=value`, "
    text += "or in a recipe file. The options of a system stand on its own page.\n"
    from unmask.api.catalogue import options as rows_of
    from unmask.data.settings import DataSettings
    from unmask.engine.settings import TrainSettings

    for title, key, settings in (("Training", "train", TrainSettings), ("Data", "data", DataSettings)):
        rows = [
            f"| `{key}.{r['name']}` | {cell(written(r['default']))} | {cell(r['description'])} |"
            for r in rows_of(settings)
        ]
        text += f"\n## {title}\n\n" + "\n".join([*HEAD, *rows]) + "\n"
    return text


def auto_page() -> str:
    """The rules of the automatic recipe, in the words of the code that follows them."""
    path = ROOT / "unmask" / "api" / "auto.py"
    if not path.is_file():
        return "# The automatic recipe\n\nIts rules are not written yet.\n"
    rules = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    _, _, rest = rules.partition("\n")
    return (
        "# The automatic recipe\n\nOn your own data `unmask train` looks at the data and at the machine, chooses by the "
        "rules below, and says in three lines what it chose and why. The same lines stand in the report. "
        "Every choice can be overridden.\n\n```sh\nunmask train mae --data photos/ train.epochs=50 backbone.depth=6\n```\n\n"
        f"{as_markdown(rest.strip())}\n"
    )


# --- words ------------------------------------------------------------------------------------------------------


def as_markdown(text: str) -> str:
    """A docstring as Markdown: double backticks become code, indented lines stay code."""
    text = re.sub(r":(?:class|func|mod|meth):`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def plain(text: str) -> str:
    """Help without Rich's markup."""
    return re.sub(r"\[/?(?:bold|dim|italic|cyan|green|red|yellow)[^\]]*\]", "", text).strip()


def written(value: Any) -> str:
    """A default as a user writes it."""
    if value is None or value == []:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return f"`[{', '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in value)}]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def cell(text: Any) -> str:
    """One cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|")
