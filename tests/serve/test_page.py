"""The page: one file that asks nobody else, and that a real browser can chat with."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest

from edgekv.serve.options import Keys
from edgekv.serve.page import PAGE

from .browser import installed, tab
from .conftest import Place, serving

BROWSER = installed()
needs_a_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium is installed (Debian: apt-get install chromium)"
)


def test_the_page_names_no_other_place_and_its_policy_allows_none(place: Place) -> None:
    answer = place.get("/")
    assert answer.text == PAGE
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"^\s*// .*$", "", PAGE, flags=re.MULTILINE))
    assert not re.search(r"\s(src|href)=\"(?!data:,)", PAGE)
    assert not re.search(r"\s(style|on[a-z]+)=", PAGE), "the policy would not allow them"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


def test_the_picture_is_made_of_numbers_that_anyone_may_ask_for(place: Place) -> None:
    place.post("/v1/completions", {"prompt": "It was a dark night. " * 20, "max_tokens": 2})
    now = place.get("/v1/edgekv/snapshot").json()
    layers = place.service.manifest.model.n_layers
    assert {len(sequence["tiers"]) for sequence in now["sequences"]} <= {0, layers}
    assert any(set("".join(sequence["tiers"])) & set("HW") for sequence in now["sequences"])
    assert sum(now["pages_by_tier"].values()) == sum(len("".join(s["tiers"])) for s in now["sequences"])
    assert now["prompt_tokens"] >= now["reused_tokens"]


@needs_a_browser
@pytest.mark.timeout(240)
def test_a_browser_chats_and_draws_the_pages_on_a_phone_without_another_network(demo: Path, tmp_path: Path) -> None:
    with serving(demo, kv_budget="25%") as place, tab(str(BROWSER), tmp_path) as page:
        page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
        page.call("Page.navigate", url=place.url)
        page.wait("document.body?.dataset.drawn === 'yes'")
        page.wait("document.title === 'demo, edgekv'")
        page.look("at('most').value = 30; at('text').value = 'Hello <b>you</b>'; at('ask').requestSubmit()")
        page.wait("document.querySelector('.turn.note')")
        note = page.look("document.querySelector('.turn.note').textContent")
        assert re.match(r"\d+ tokens read, 0 of them from the cache; 30 written.*; cut at the limit", note)
        assert page.look("document.querySelector('.turn.user').textContent") == "Hello <b>you</b>"
        assert page.look("document.querySelector('.turn.assistant').textContent")
        page.wait(
            "[...document.querySelectorAll('figcaption')].some(text => /[1-9]\\d* tokens/.test(text.textContent))"
        )
        drawn = page.look(
            "[...document.querySelectorAll('canvas')].map(c => new Set(new Uint32Array("
            "c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size)"
        )
        assert max(drawn) >= 2, "a picture of pages has a colour for them, and one for the gaps"
        assert page.look("document.documentElement.scrollWidth") == 360, "nothing is wider than the phone"
        page.look("at('most').value = 900; at('text').value = 'And then?'; at('ask').requestSubmit()")
        page.wait("document.querySelectorAll('.turn.assistant')[1]?.textContent")
        page.look("at('stop').click()")
        page.wait("document.querySelectorAll('.turn.note')[1]?.textContent === 'stopped'")
        page.wait("!at('send').disabled")
        grounds = []
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            page.call("Emulation.setEmulatedMedia", features=features)
            grounds.append(page.look("getComputedStyle(document.body).backgroundColor"))
            shot = page.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
            (tmp_path / f"{scheme}.png").write_bytes(base64.b64decode(shot))
        assert len(set(grounds)) == 2
        asked = [params["request"]["url"] for name, params in page.events if name == "Network.requestWillBeSent"]
        assert asked
        assert all(url.startswith((f"{place.url}/", "data:")) for url in asked)
        said = [params["entry"]["text"] for name, params in page.events if name == "Log.entryAdded"]
        assert said == [], "the policy blocks nothing that the page needs"


@needs_a_browser
@pytest.mark.timeout(240)
def test_a_browser_asks_for_the_key_and_keeps_it_for_this_tab(demo: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.touch(0o600)
    keys.write_text("a-key\n")
    with serving(demo, parallel=1, keys=Keys.read(keys)) as place, tab(str(BROWSER), tmp_path / "profile") as page:
        page.call("Page.navigate", url=place.url)
        page.wait("document.querySelector('#key:not([hidden])')")
        page.look("at('secret').value = 'a-key'; at('key').requestSubmit()")
        page.wait("document.body.dataset.drawn === 'yes' && at('key').hidden")
        assert page.look("localStorage.length") == 0
