"""ComfyUI in a real browser: a server with this pack, Chromium, and pages that a test drives as a user would."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from paths import COMFYUI, ROOT
from PIL import Image

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
PACK = "custom_nodes.cat-diffusion"
HOST_NOISE = [  # (message, address) of console errors that ComfyUI itself makes without any pack
    (r"ComfyApp graph accessed before initialization", r""),  # its own start-up order
    (r"404", r"/user\.css$"),  # a style sheet that users may add
    (
        r"404",
        r"/docs/\w+/\w+\.md$",
    ),  # looks for a help page in the user's language before the English one
    (
        r"net::ERR_NAME_NOT_RESOLVED",
        r"^https://",
    ),  # news and model sizes from the internet, which these tests cut off
]
DROP = """([name, text]) => {
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([text], name, {type: "application/json"}));
    document.querySelector("#graph-canvas").dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}));
}"""


READY = "() => !app.extensionManager.spinner && !document.querySelector('.p-blockui-mask')"  # nothing loads
CALM = """document.addEventListener("DOMContentLoaded", () => {
    const style = document.createElement("style");  // the overlay of a loading page would stay if it came again while it fades out
    style.textContent = ".p-blockui-mask {animation: none !important}";
    document.head.append(style);
})"""


@pytest.fixture(scope="session")
def chromium():
    """Path of Chromium, installed first where apt can. In CI a failed installation is an error, elsewhere the tests are skipped."""
    names = ("chromium", "google-chrome", "chromium-browser")
    found = next(filter(None, map(shutil.which, names)), None)
    reason = f"no {' or '.join(names)} on the path, and only root with apt-get can install it here"
    if not found and shutil.which("apt-get") and os.geteuid() == 0:
        for command in (["update"], ["install", "-y", "chromium"]):
            done = subprocess.run(
                ["apt-get", "-qq", *command],
                capture_output=True,
                text=True,
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            )
        found, reason = (
            shutil.which("chromium"),
            f"apt-get cannot install chromium: {done.stderr.strip()[-300:]}",
        )
    if not found:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return found


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """ComfyUI's user folder, with a photo under every name that an example workflow loads."""
    from comfyui.local_server import make_base

    base = tmp_path_factory.mktemp("base")
    make_base(base)
    user = base / "user/default"
    for folder in ("workflows", "subgraphs"):
        (user / folder).mkdir(parents=True)
    (user / "user.css").touch()
    for name, content in (
        ("comfy.settings", {"Comfy.TutorialCompleted": True}),
        ("comfy.templates", {}),
    ):
        (user / f"{name}.json").write_text(
            json.dumps(content)
        )  # else a dialog covers the page, and a missing file is an error
    photo, mask = (
        Image.open(ROOT / "tools/photograph" / name).resize((256, 192))
        for name in ("photo.jpg", "mask.png")
    )
    photo.putalpha(mask.convert("L").point(lambda value: 255 - value))
    for path in WORKFLOWS:
        for node in json.loads(path.read_text())["nodes"]:
            if node["type"] in ("LoadImage", "LoadImageMask"):
                photo.save(base / "input" / Path(node["widgets_values"][0]).with_suffix(".png"))
    return base


@pytest.fixture(scope="session")
def server(base, chromium):
    """The running server."""
    from comfyui import install
    from comfyui.local_server import LocalServer

    if f'"{install.NEWEST}"' not in (COMFYUI / "comfyui_version.py").read_text():
        pytest.skip(f"the browser tests know the pages of ComfyUI {install.NEWEST} only")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "OMP_NUM_THREADS", "1"
        )  # the demo model is tiny, and threads that wait for each other starve beside Chromium
        with LocalServer(base, "--cpu", "--use-pytorch-cross-attention") as server:
            yield server


@pytest.fixture(scope="session")
def screenshots(request, tmp_path_factory):
    """Folder for pictures of the pages."""
    chosen = os.environ.get("CAT_DIFFUSION_SCREENSHOTS")
    folder = request.config.screenshots = (
        Path(chosen).absolute() if chosen else tmp_path_factory.mktemp("screenshots")
    )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def pytest_terminal_summary(terminalreporter, config):
    if hasattr(config, "screenshots"):
        terminalreporter.write_line(f"Screenshots: {config.screenshots}")


@pytest.fixture(
    scope="package"
)  # no longer: no test can run an event loop of its own beside Playwright's
def page(server, chromium, screenshots):
    """The one page of all tests; to open it takes longer than most tests."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=FLAGS
        )  # with a fresh user folder
        tab = browser.new_page(viewport={"width": 1600, "height": 1000})
        tab.add_init_script(CALM)
        tab.set_default_timeout(
            90_000
        )  # a machine may be busy; what does not come at all is found out all the same
        yield Canvas(tab, server, screenshots)
        browser.close()


@pytest.fixture
def canvas(page, request):
    """The page, in English or in the locale that the test is given; the test fails if the page writes errors to its console."""
    page.speak(
        getattr(request.node, "callspec", None)
        and request.node.callspec.params.get("locale")
        or "en"
    )
    page.errors.clear()
    yield page
    page.set("Comfy.ColorPalette", "dark")
    assert page.errors == []


class Canvas:
    """A page with ComfyUI's canvas. `errors` are those of the page's console, less the host's own noise."""

    def __init__(self, page, server, screenshots):
        self.page, self.server, self.screenshots = page, server, screenshots
        self.errors, self.locale, self.drops = [], None, 0
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._console)

    def speak(self, locale):
        """Open ComfyUI in this language, unless it is open in it."""
        if self.locale != locale:
            self.page.request.post(f"{self.server.url}/api/settings", data={"Comfy.Locale": locale})
            self.page.goto(self.server.url)
            self.until(
                "() => Boolean(window.LiteGraph?.registered_node_types.CATSemanticInpaint "
                "&& window.app?.extensionManager?.workflow.activeWorkflow)",
                seconds=120,
            )
            self.page.wait_for_timeout(1000)
            self.until(READY)
            self.locale = locale

    def _console(self, message):
        address = message.location.get("url", "")
        if message.type == "error" and not any(
            re.search(text, message.text) and re.search(where, address)
            for text, where in HOST_NOISE
        ):
            self.errors.append(f"{message.text} {address}")

    def nodes(self):
        """Ids of the pack's nodes."""
        nodes = self.page.request.get(f"{self.server.url}/api/object_info").json()
        return sorted(id for id, node in nodes.items() if node["python_module"] == PACK)

    def run(self, script, argument=None):
        """JavaScript in the page."""
        return self.page.evaluate(script, argument)

    def until(self, script, argument=None, seconds=40):
        """Wait until a condition in JavaScript is true."""
        self.page.wait_for_function(script, arg=argument, timeout=1000 * seconds)

    def set(self, setting, value):
        self.run(
            "([setting, value]) => app.extensionManager.setting.set(setting, value)",
            [setting, value],
        )

    def render(self, renderer):
        """Choose "classic" or "nodes2"; a graph must be there."""
        if self.run("app.extensionManager.setting.get('Comfy.VueNodes.Enabled')") != (
            renderer == "nodes2"
        ):
            self.set("Comfy.VueNodes.Enabled", renderer == "nodes2")
        self.until(
            "(shown) => (document.querySelector('[data-testid=node-title]') !== null) === shown",
            renderer == "nodes2",
        )

    def drop(self, name, workflow):
        """Drop a workflow file onto the canvas."""
        self.drops += 1  # a name of its own, to tell the new tab from older ones
        name = f"{Path(name).stem}-{self.drops}"
        self.until(READY)
        self.run(DROP, [f"{name}.json", json.dumps(workflow)])
        self.until(
            "([name, count]) => app.extensionManager.workflow.activeWorkflow?.filename === name "
            "&& app.graph.nodes.length === count",
            [name, len(workflow["nodes"])],
        )
        self.until(READY)

    def build(self, nodes, links):
        """A graph from {name: (class, {widget: value})} and [(from, output, to, input)]; it is {name: node} in window.nodes."""
        self.run(
            """async ([nodes, links]) => {
            const graph = new app.graph.constructor();
            graph.state.lastNodeId = window.built = (window.built ?? 0) + 100;  // no id twice: Nodes 2.0 keeps things by id
            const made = {};
            Object.entries(nodes).forEach(([name, [type, values]], i) => {
                const node = (made[name] = LiteGraph.createNode(type));
                node.pos = [420 * (i % 3), 60 + 480 * Math.floor(i / 3)];
                graph.add(node);
                Object.entries(values).forEach(([widget, value]) => (node.widgets.find(({name}) => name === widget).value = value));
            });
            links.forEach(([from, output, to, input]) =>
                made[from].connect(output, made[to], made[to].findInputSlot(input)));
            const ids = Object.entries(made).map(([name, {id}]) => [name, id]);
            const workflow = graph.serialize();
            graph.clear();
            await app.loadGraphData(workflow, true, false, app.extensionManager.workflow.activeWorkflow);
            window.nodes = Object.fromEntries(ids.map(([name, id]) => [name, app.graph.getNodeById(id)]));
            Object.assign(app.canvas.ds, {scale: 1, offset: [130, 120]});
            app.canvas.setDirty(true, true);
        }""",
            [nodes, links],
        )

    def problems(self):
        """What ComfyUI reports about the workflow on the canvas: a set of "missing-node", "missing-model", "missing-media"..."""
        self.page.wait_for_timeout(
            1500
        )  # models and pictures are looked for after the nodes are there
        details = self.page.get_by_text("View details", exact=True)
        if details.count() == 0:
            return set()
        details.first.click()
        groups = self.page.locator(
            "[data-testid^=error-group-]:not([data-testid=error-group-display-message])"
        )
        groups.first.wait_for()
        return {
            name.removeprefix("error-group-")
            for name in groups.evaluate_all("all => all.map((one) => one.dataset.testid)")
        }

    def queue(self, seconds=300):
        """Press Run and wait for the end; the outputs are in app.nodeOutputs then."""
        self.run("""() => {
            window.ended = null;
            for (const event of ["execution_success", "execution_error", "execution_interrupted"])
                app.api.addEventListener(event, ({detail}) => (window.ended = [event, detail.exception_message]), {once: true});
        }""")
        self.page.get_by_test_id("queue-button").click()
        self.until("() => window.ended !== null", seconds=seconds)
        assert self.run("window.ended[0]") == "execution_success", self.run("window.ended")

    def screenshot(self, name):
        self.page.wait_for_timeout(500)  # until the canvas is drawn
        self.page.screenshot(path=self.screenshots / f"{name}.png")
