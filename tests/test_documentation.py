"""The documentation: it builds, its links lead somewhere, its names exist and its code runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
from pdoc.__main__ import cli

import opdc
import opdc.guide

GUIDE = Path(opdc.guide.__file__).parent
PAGES = sorted(GUIDE.glob("*.md"))
README = Path(__file__).parent.parent / "README.md"
COMMAND = re.search(r"^python -m pdoc (?:.*\\\n)*.*$", opdc.guide.__doc__, re.MULTILINE)[0]
WORDS = COMMAND.replace("\\\n", "").split()

# A block that only has to compile says why: `<!-- not run: needs a server -->` on the line before.
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?"
    r"```(?P<language>python|pycon)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Page(HTMLParser):
    """What a page can be linked by, and where its own links go."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors, self.links = {""}, set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.anchors.add(value)
            if name in ("href", "src") and not value.startswith("data:"):
                self.links.add(value)
            if tag == "meta" and name == "content" and "url=" in value:
                self.links.add(value.partition("url=")[2])


@pytest.fixture
def site(tmp_path):
    """What the command of `opdc.guide` builds. A warning of pdoc is an error, as in all tests."""
    places = {"python/opdc/guide/theme": str(GUIDE / "theme"), "site": str(tmp_path)}
    cli([places.get(word, word) for word in WORDS[3:]])
    return tmp_path


def test_every_link_of_the_site_leads_somewhere_and_every_page_is_reached(site):
    texts = {path: path.read_text() for path in site.rglob("*.html")}
    pages = {path: Page(text) for path, text in texts.items()}
    assert len(pages) > len(PAGES)
    broken, reached, waiting = [], set(), [site / "index.html"]
    while waiting:
        path = waiting.pop()
        if path in reached:
            continue
        reached.add(path)
        for link in pages[path].links:
            if link.startswith("https://"):
                continue
            target, _, anchor = link.partition("#")
            linked = (path.parent / target).resolve() if target else path
            if linked in pages and anchor in pages[linked].anchors:
                waiting.append(linked)
            elif linked.suffix == ".html" or not linked.exists():
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken
    assert reached == set(pages)
    # pdoc takes a name that follows a "=" or a "/" apart, and doubles its beginning.
    assert not [path for path, text in texts.items() if "opdc<a" in text]


def resolve(name: str) -> object:
    """What a dotted name means, where every part of it is public."""
    thing, *parts = opdc, *name.split(".")[1:]
    for part in parts:
        assert not part.startswith("_")
        if isinstance(thing, ModuleType):
            try:
                thing = importlib.import_module(f"{thing.__name__}.{part}")
                continue
            except ModuleNotFoundError:
                assert part in getattr(thing, "__all__", [part])
        elif inspect.isclass(thing) and part in inspect.get_annotations(thing):
            return thing
        thing = getattr(thing, part)
    return thing


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.stem)
def test_names_in_the_texts_exist(page):
    unknown = []
    for name in sorted(
        set(re.findall(r"(?<![/\w])opdc(?:\.[a-z_A-Z]\w*)+\b(?!\.\w)", page.read_text()))
    ):
        try:
            resolve(name)
        except (AssertionError, AttributeError, ImportError):
            unknown.append(name)
    assert not unknown


def undocumented(name: str) -> list[str]:
    """The public names of a module, and the methods of its classes, that say nothing."""
    module, missing = importlib.import_module(name), []
    for member in getattr(module, "__all__", [m for m in vars(module) if not m.startswith("_")]):
        thing, full_name = getattr(module, member), f"{name}.{member}"
        if inspect.ismodule(thing):
            if thing.__name__ == full_name:
                missing += undocumented(full_name)
        elif callable(thing) and getattr(thing, "__module__", "").startswith("opdc"):
            missing += [] if thing.__doc__ else [full_name]  # a class may inherit its docstring
            methods = vars(thing).items() if inspect.isclass(thing) else ()
            missing += [
                f"{full_name}.{method}"
                for method, function in methods
                if not method.startswith("_")
                and inspect.isfunction(function)
                and not inspect.getdoc(getattr(thing, method))
            ]
    return missing if module.__doc__ else [name, *missing]


def test_every_public_name_of_a_page_has_a_docstring():
    modules = [word for word in WORDS if re.fullmatch(r"opdc(\.\w+)*", word)]
    assert "opdc" in modules
    assert not [name for module in modules for name in undocumented(module)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_the_guides_runs(page):
    """In order, in one namespace; lines with a prompt print what stands below them."""
    text = page.read_text()
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == len(re.findall(r"^ *```py", text, re.MULTILINE)), "an unknown info string"
    namespace = {"__name__": "__main__"}
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for block in blocks:
        line = text[: block.start("code")].count("\n")
        if block["language"] == "pycon":
            test = doctest.DocTestParser().get_doctest(
                block["code"], namespace, page.stem, str(page), line
            )
            doctest.DebugRunner(optionflags=options).run(test, clear_globs=False)
            namespace = test.globs  # which holds what the examples defined
            continue
        code = compile("\n" * line + block["code"], str(page), "exec")
        if block["reason"] is None:
            exec(code, namespace)
