"""Draft families from outside the package: what is found, and what is refused with which words."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from pdspec.cli.options import cluster_config, worker_flags
from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.errors import ConfigError, UnknownName
from pdspec.spec import plugins
from pdspec.spec.registry import NAMES, check_options, describe, family, names
from tests.documented import ROOT, code_blocks

(TOY,) = code_blocks(ROOT / "docs" / "adding-a-drafter.md", "python")


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "bigram.py"
    path.write_text(TOY)
    return str(path)


def test_a_file_is_a_family_beside_the_package_s_own(toy):
    assert names((toy,)) == (*NAMES, "bigram") and describe((toy,))[-1]["name"] == "bigram"
    assert family("bigram", (toy,)) is family("bigram", (toy, toy)), "a file is loaded once"
    with pytest.raises(UnknownName, match="bigram"):
        family("bigram")
    with pytest.raises(UnknownName, match="bigram"):
        family("trigram", (toy,))
    check_options({"suffix:alpha": "2"} if "alpha" in family("suffix").DESCRIPTION.options else {}, (toy,))


def test_a_module_is_a_family(toy, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    assert names(("bigram",))[-1] == "bigram"


def test_an_installed_package_s_entry_point_is_a_family(toy, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("bigram", "bigram", plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: (point,))
    assert names() == (*NAMES, "bigram") and family("bigram").DESCRIPTION.default_tree == "chain(4)"
    with pytest.raises(ConfigError, match="taken by bigram of"):
        names((toy,))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nowhere_at_all", "ModuleNotFoundError.*nowhere_at_all"),
        ("def (", "SyntaxError"),
        ("x = 1", "no DESCRIPTION and no groups and no make"),
        (TOY.replace("DESCRIPTION = Description(", "DESCRIPTION = dict("), "AttributeError|DESCRIPTION is no"),
        (TOY.replace('name="bigram"', 'name="ngram"'), "'ngram' is taken by pdspec itself"),
        (TOY.replace('name="bigram"', 'name="bi gram"'), "is no name"),
    ],
)
def test_what_is_no_family_is_refused_with_the_file(tmp_path, text, said):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"plugins: .*mine\.py.*({said})"):
        names((str(path),))


def test_a_missing_file_and_a_missing_module_are_refused():
    with pytest.raises(ConfigError, match=r"nowhere\.py: there is no such file"):
        names(("nowhere.py",))
    with pytest.raises(ConfigError, match=r"nowhere\.drafter: ModuleNotFoundError"):
        names(("nowhere.drafter",))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("return Bigram()", "return object()", "drafter bigram has no name, no groups"),
        ("return Bigram()", "return parts.nothing", "drafter bigram: AttributeError"),
        ("    name = DESCRIPTION.name", '    name = "other"', "calls itself 'other'"),
        ("return ()  # it", "return 3 + ()  # it", "drafter bigram: TypeError"),
    ],
)
def test_a_drafter_that_cannot_start_is_refused_by_name(tmp_path, old, new, said):
    assert old in TOY
    path = tmp_path / "bigram.py"
    path.write_text(TOY.replace(old, new))
    config = WorkerConfig(model="tiny", drafters=("none", "bigram"), drafter="bigram", plugins=(str(path),), threads=1)
    with pytest.raises(ConfigError, match=said):
        LocalGenerator(config)


def test_settings_hold_whole_paths_and_flags_hold_the_family_ready(toy, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert WorkerConfig(plugins=("bigram.py", "package.module")).plugins == (toy, "package.module")
    flags = worker_flags(plugins=["bigram.py"], drafter="bigram")
    assert cluster_config(worker=flags).worker.drafters == (*WorkerConfig().drafters, "bigram")
    given = cluster_config(sets=["worker.drafters=none,bigram"], worker=flags).worker
    assert given.drafters == ("none", "bigram") and given.plugins == (toy,)


def test_the_registry_loads_no_torch_for_plugins_that_need_none(tmp_path):
    path = tmp_path / "quiet.py"
    path.write_text("from pdspec.spec.ngram.family import groups, make\nfrom pdspec.spec.family import Description\n"
                    'DESCRIPTION = Description(name="quiet", summary="", needs="", ships="", trees=("chain",),'
                    ' default_tree="chain(7)", source="")\n')
    code = f"import sys, pdspec.spec.registry as r; r.describe(({str(path)!r},)); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
