"""The page of a report in a browser: nothing is fetched, nothing is wrong, and it fits a phone."""

import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.evaluation import Comparison, Evaluation, TextLoss
from optimum_fwdprune.report.canvas import PALETTE
from optimum_fwdprune.report.document import describe, document_of
from optimum_fwdprune.report.page import DARK, write_page


WIDTHS = {"phone": 390, "desk": 1280}


@pytest.fixture(scope="module")
def browser():
    """Chromium that is installed, or that playwright brought along."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        path = installed or running.chromium.executable_path
        if not os.path.exists(path):
            pytest.skip("no Chromium is installed: `playwright install chromium`, or the system's package")
        # Containers run as root, which the sandbox refuses.
        with running.chromium.launch(executable_path=path, args=["--no-sandbox"]) as chromium:
            yield chromium


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A report of two checkpoints with long names, one of which learned."""
    folder = tmp_path_factory.mktemp("report")
    tokens = torch.randint(0, tiny.VOCAB, (8, 24), generator=torch.Generator().manual_seed(1))
    described = []
    for name, fields in (("scored", {}), ("learned", {"method": "policy_gradient", "steps": 8})):
        pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
        pruner.prune(tiny.request(sparsity=0.3, **fields), tokens)
        texts = [{"a-text-with-a-very-long-name-that-goes-on-and-on.jsonl": TextLoss(20.0 + k, 10)} for k in (0, 1)]
        comparison = Comparison([Evaluation(each, text, []) for each, text in zip(("dense", name), texts)])
        long = f"organisation/{name}-by-a-method-under-a-name-that-does-not-end-where-one-would-like-it-to"
        described.append(describe(long, pruner.report.record, comparison))
    write_page(document_of(described), folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS, ids=WIDTHS.get)
def test_the_page_fetches_nothing_complains_of_nothing_and_fits(browser, page_file, width, scheme):
    page = browser.new_page(viewport={"width": WIDTHS[width], "height": 800}, color_scheme=scheme)
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(Path(page_file).as_uri())
    # What is folded must fit as well.
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")

    assert [url for url in requests if not url.startswith("data:")] == [Path(page_file).as_uri()]
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width]
    # Tables may be wider than a phone, and scroll in their own frame.
    wide = """() => [...document.querySelectorAll('main *')].filter(each => !each.closest('.scroll') &&
        !each.closest('svg') && each.getBoundingClientRect().right > innerWidth).map(each => each.outerHTML)"""
    assert page.evaluate(wide) == []
    page.close()


@pytest.mark.parametrize(("scheme", "palette"), [("light", PALETTE), ("dark", DARK)])
def test_pictures_and_text_follow_the_readers_theme(browser, page_file, scheme, palette):
    page = browser.new_page(color_scheme=scheme)
    page.goto(Path(page_file).as_uri())
    color = page.evaluate("getComputedStyle(document.body).color")
    fills = page.evaluate("[...document.querySelectorAll('svg path')].map(each => getComputedStyle(each).fill)")
    page.close()

    def rgb(name):
        return f"rgb({', '.join(str(int(palette[name][place : place + 2], 16)) for place in (1, 3, 5))})"

    assert color == rgb("ink")
    assert {rgb("attention"), rgb("mlp"), rgb("track")} <= set(fills)


def test_letters_of_pictures_can_be_read_on_a_phone(browser, page_file):
    page = browser.new_page(viewport={"width": WIDTHS["phone"], "height": 800})
    page.goto(Path(page_file).as_uri())
    height = """() => [...document.querySelectorAll('svg text')].map(each => {
        const svg = each.ownerSVGElement;
        return each.getBBox().height * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    })"""
    heights = page.evaluate(height)
    page.close()

    assert len(heights) > 50 and min(heights) >= 9
