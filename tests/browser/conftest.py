"""ComfyUI in a real browser: a server with this pack, Chromium, and a page to drive.

Tests drive it as a user would.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from paths import COMFYUI, ROOT
from PIL import Image, ImageOps

from comfyui import install
from comfyui.local_server import LocalServer, make_base

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
# (message, address) of console errors that ComfyUI itself makes without any pack.
HOST_NOISE = [
    # Its own start-up order.
    (r"ComfyApp graph accessed before initialization", r""),
    # A style sheet that users may add.
    (r"404", r"/user\.css$"),
    # A help page in the user's language, which is looked for before the English one.
    (r"404", r"/docs/\w+/\w+\.md$"),
    # News and model sizes from the internet, which these tests cut off.
    (r"net::ERR_NAME_NOT_RESOLVED", r"^https://"),
]
DROP = """([name, text]) => {
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([text], name, {type: "application/json"}));
    const drop = new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true});
    document.querySelector("#graph-canvas").dispatchEvent(drop);
}"""
# Nothing loads any more.
READY = "() => !app.extensionManager.spinner && !document.querySelector('.p-blockui-mask')"
# The overlay of a loading page would stay if it came again while it fades out.
CALM = """document.addEventListener("DOMContentLoaded", () => {
    const style = document.createElement("style");
    style.textContent = ".p-blockui-mask {animation: none !important}";
    document.head.append(style);
})"""


@pytest.fixture(scope="session")
def chromium():
    """Path of Chromium, installed first where apt can.

    In CI a failed installation is an error, elsewhere the tests are skipped.
    """
    names = ("chromium", "google-chrome", "chromium-browser")
    for path in map(shutil.which, names):
        if path:
            return path
    reason = f"no {' or '.join(names)} on the path, and only root with apt-get can install it here"
    if shutil.which("apt-get") and os.geteuid() == 0:
        apt_get("update")
        done = apt_get("install", "-y", "chromium")
        if path := shutil.which("chromium"):
            return path
        reason = f"apt-get cannot install chromium: {done.stderr.strip()[-300:]}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def apt_get(*arguments):
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "-qq", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """ComfyUI's user folder, with a photo under every name that an example workflow loads."""
    base = tmp_path_factory.mktemp("base")
    make_base(base)
    user = base / "user/default"
    for folder in ("workflows", "subgraphs"):
        (user / folder).mkdir(parents=True)
    (user / "user.css").touch()
    # Else a dialog covers the page, and a missing file is an error.
    (user / "comfy.settings.json").write_text(json.dumps({"Comfy.TutorialCompleted": True}))
    (user / "comfy.templates.json").write_text("{}")
    photo = Image.open(ROOT / "web/photograph/photo.jpg").resize((256, 192))
    mask = Image.open(ROOT / "web/photograph/mask.png").resize((256, 192))
    photo.putalpha(ImageOps.invert(mask.convert("L")))
    for path in WORKFLOWS:
        for node in json.loads(path.read_text())["nodes"]:
            if node["type"] in ("LoadImage", "LoadImageMask"):
                photo.save(base / "input" / Path(node["widgets_values"][0]).with_suffix(".png"))
    return base


@pytest.fixture(scope="session")
def server(base, chromium):
    """The running server."""
    if f'"{install.NEWEST}"' not in (COMFYUI / "comfyui_version.py").read_text():
        pytest.skip(f"the browser tests know the pages of ComfyUI {install.NEWEST} only")
    with pytest.MonkeyPatch.context() as patch:
        # The demo model is tiny, and threads that wait for each other starve beside Chromium.
        patch.setenv("OMP_NUM_THREADS", "1")
        with LocalServer(base, "--cpu", "--use-pytorch-cross-attention") as server:
            yield server


@pytest.fixture(scope="session")
def screenshots(request, tmp_path_factory):
    """Folder for pictures of the pages."""
    chosen = os.environ.get("CAT_DIFFUSION_SCREENSHOTS")
    folder = Path(chosen).absolute() if chosen else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    request.config.screenshots = folder
    return folder


def pytest_terminal_summary(terminalreporter, config):
    if hasattr(config, "screenshots"):
        terminalreporter.write_line(f"Screenshots: {config.screenshots}")


# For no longer than the package: beside Playwright's no test can run an event loop of its own.
@pytest.fixture(scope="package")
def page(server, chromium, screenshots):
    """The one page of all tests; to open it takes longer than most tests."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # With a fresh user folder.
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        tab = browser.new_page(viewport={"width": 1600, "height": 1000})
        tab.add_init_script(CALM)
        # A machine may be busy; what does not come at all is found out all the same.
        tab.set_default_timeout(90_000)
        yield Canvas(tab, server, screenshots)
        browser.close()


@pytest.fixture
def canvas(page, request):
    """The page, in English or in the locale that the test is given.

    The test fails if the page writes errors to its console.
    """
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    page.speak(parameters.get("locale", "en"))
    page.errors.clear()
    yield page
    page.set("Comfy.ColorPalette", "dark")
    assert page.errors == []


class Canvas:
    """A page with ComfyUI's canvas.

    `errors` are those of the page's console, less the host's own noise.
    """

    def __init__(self, page, server, screenshots):
        self.page = page
        self.server = server
        self.screenshots = screenshots
        self.errors = []
        self.locale = None
        self.drops = 0
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
        if message.type != "error":
            return
        for text, where in HOST_NOISE:
            if re.search(text, message.text) and re.search(where, address):
                return
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
        wanted = renderer == "nodes2"
        if self.run("app.extensionManager.setting.get('Comfy.VueNodes.Enabled')") != wanted:
            self.set("Comfy.VueNodes.Enabled", wanted)
        self.until(
            "(shown) => (document.querySelector('[data-testid=node-title]') !== null) === shown",
            wanted,
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
        """Put a graph onto the canvas; it is {name: node} in window.nodes.

        Args:
            nodes: {name: (class, {widget: value})}.
            links: [(from, output, to, input)].
        """
        self.run(
            """async ([nodes, links]) => {
            const graph = new app.graph.constructor();
            // No id twice: Nodes 2.0 keeps things by id.
            window.built = (window.built ?? 0) + 100;
            graph.state.lastNodeId = window.built;
            const made = {};
            Object.entries(nodes).forEach(([name, [type, values]], i) => {
                const node = (made[name] = LiteGraph.createNode(type));
                node.pos = [420 * (i % 3), 60 + 480 * Math.floor(i / 3)];
                graph.add(node);
                Object.entries(values).forEach(([widget, value]) => {
                    node.widgets.find(({name}) => name === widget).value = value;
                });
            });
            links.forEach(([from, output, to, input]) =>
                made[from].connect(output, made[to], made[to].findInputSlot(input)));
            const ids = Object.entries(made).map(([name, {id}]) => [name, id]);
            const workflow = graph.serialize();
            graph.clear();
            const active = app.extensionManager.workflow.activeWorkflow;
            await app.loadGraphData(workflow, true, false, active);
            window.nodes = {};
            ids.forEach(([name, id]) => (window.nodes[name] = app.graph.getNodeById(id)));
            Object.assign(app.canvas.ds, {scale: 1, offset: [130, 120]});
            app.canvas.setDirty(true, true);
        }""",
            [nodes, links],
        )

    def problems(self):
        """What ComfyUI reports about the workflow on the canvas.

        Returns a set of "missing-node", "missing-model", "missing-media"...
        """
        # Models and pictures are looked for after the nodes are there.
        self.page.wait_for_timeout(1500)
        details = self.page.get_by_text("View details", exact=True)
        if details.count() == 0:
            return set()
        details.first.click()
        groups = self.page.locator(
            "[data-testid^=error-group-]:not([data-testid=error-group-display-message])"
        )
        groups.first.wait_for()
        names = groups.evaluate_all("all => all.map((one) => one.dataset.testid)")
        return {name.removeprefix("error-group-") for name in names}

    def queue(self, seconds=300):
        """Press Run and wait for the end; the outputs are in app.nodeOutputs then."""
        self.run("""() => {
            window.ended = null;
            for (const event of ["execution_success", "execution_error", "execution_interrupted"]) {
                const end = ({detail}) => (window.ended = [event, detail.exception_message]);
                app.api.addEventListener(event, end, {once: true});
            }
        }""")
        self.page.get_by_test_id("queue-button").click()
        self.until("() => window.ended !== null", seconds=seconds)
        assert self.run("window.ended[0]") == "execution_success", self.run("window.ended")

    def screenshot(self, name):
        self.page.wait_for_timeout(500)  # until the canvas is drawn
        self.page.screenshot(path=self.screenshots / f"{name}.png")
