"""Cards: what exists, found without torch, in this package and in others."""

import json
import subprocess
import sys
import textwrap
from importlib import metadata

import pytest

from unmask import catalog
from unmask.catalog import backbone_card, card, cards, list_systems, read_card, recipes
from unmask.errors import UserError


def fresh(code: str, *paths) -> str:
    """The output of a new Python that sees ``paths`` first."""
    lines = [f"import sys; sys.path[:0] = {[str(p) for p in paths]!r}", textwrap.dedent(code)]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_listing_the_systems_does_not_import_torch():
    code = """
        import unmask.catalog
        found = unmask.catalog.list_systems()
        print(len(found), "torch" in sys.modules, "numpy" in sys.modules)
    """
    count, torch, numpy = fresh(code).split()
    assert int(count) >= 4
    assert (torch, numpy) == ("False", "False")


def test_every_card_names_code_that_exists_and_files_that_read():
    for found in list_systems():
        assert found.title, found.slug
        assert found.verb in catalog.VERBS, found.slug
        assert found.path.is_dir()
        assert isinstance(recipes(found.slug), dict)
        json.dumps(found.plain())


def test_the_slug_is_the_name_of_the_folder():
    assert all(c.path.name == slug for slug, c in cards().items())


@pytest.fixture
def other_package(tmp_path):
    """An installed package with one system and the entry point that announces it, as pip would leave it."""
    folder = tmp_path / "masked_extras" / "sketch"
    folder.mkdir(parents=True)
    (tmp_path / "masked_extras/__init__.py").write_text("")
    (folder / "__init__.py").write_text("")
    (folder / "model.py").write_text("class Sketch:\n    slug = 'sketch'\n")
    (folder / "card.toml").write_text(
        'slug = "sketch"\ntitle = "A system of another package"\nverb = "train"\nroom = "pretraining"\n'
        'entry = "masked_extras.sketch.model:Sketch"\n'
    )
    (folder / "recipes.yaml").write_text("tiny: {about: nothing much}\n")
    info = tmp_path / "masked_extras-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: masked-extras\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[unmask.systems]\nextras = masked_extras\n")
    return tmp_path


def test_another_package_adds_a_system(other_package):
    code = """
        import json
        from unmask.catalog import card, list_systems, recipes
        found = card("sketch")
        print(json.dumps([found.package, found.room, found.load().slug, recipes("sketch"), "torch" in sys.modules]))
        print("sketch" in [c.slug for c in list_systems("train")])
    """
    first, listed = fresh(code, other_package).splitlines()
    assert json.loads(first) == ["masked_extras", "pretraining", "sketch", {"tiny": {"about": "nothing much"}}, False]
    assert listed == "True"


def test_two_systems_of_one_name_are_an_error(other_package):
    path = other_package / "masked_extras/sketch/card.toml"
    path.write_text(path.read_text().replace('slug = "sketch"', 'slug = "mae"'))
    code = """
        from unmask.catalog import cards
        from unmask.errors import UserError
        try:
            cards()
        except UserError as error:
            print(error)
    """
    assert "two systems call themselves 'mae'" in fresh(code, other_package)


def test_an_entry_point_whose_package_is_gone_does_not_hinder(monkeypatch):
    point = metadata.EntryPoint("ghost", "no_such_package_anywhere", "unmask.systems")
    monkeypatch.setattr(catalog.metadata, "entry_points", lambda group: [point])
    catalog.cards.cache_clear()
    try:
        assert "mae" in cards()
    finally:
        catalog.cards.cache_clear()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slug = ", "not TOML"),
        ('slug = "x"', "needs 'title'"),
        ('slug = "x"\ntitle = "X"\nauthor = "Y"', "did you mean authors"),
    ],
)
def test_a_card_that_does_not_fit_names_file_and_key(tmp_path, text, words):
    path = tmp_path / "card.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        read_card(path)
    assert str(path) in str(error.value)


def test_unknown_names_give_the_nearest():
    with pytest.raises(UserError, match="did you mean mae"):
        card("maee")
    with pytest.raises(UserError, match="did you mean train"):
        list_systems("trian")
    with pytest.raises(UserError, match="did you mean vit_small_patch16"):
        backbone_card("vitsmall_patch16")


def test_a_backbones_family_is_found_by_the_beginning_of_its_name():
    assert backbone_card("timm/resnet18").slug == "timm"
    assert backbone_card("vit_tiny_patch4").slug == "vit"
    assert backbone_card("swin_tiny").slug == "swin"
