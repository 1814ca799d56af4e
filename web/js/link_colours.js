/**
 * Colours of the pack's own wires, which would look like texts otherwise.
 *
 * ComfyUI sets the colours of all types again with every palette, those that it does not know to none: ours are read-only, and
 * Nodes 2.0 reads a style sheet where the palette says nothing.
 */

import { app } from "/scripts/app.js";

const COLOURS = { CAT_MODEL: "#e8853a", VISUAL_PROMPT: "#d65db1", CAT_CROP: "#3fb8a5" };

app.registerExtension({
    name: "cat-diffusion.link-colours",

    setup() {
        const style = document.createElement("style");
        style.textContent = `:root {${Object.entries(COLOURS).map(([type, colour]) => `--color-datatype-${type}: ${colour};`).join(" ")}}`;
        document.head.append(style);
        for (const colours of [app.canvas.default_connection_color_byType, app.canvas.constructor.link_type_colors]) {
            for (const [type, colour] of Object.entries(COLOURS)) {
                Object.defineProperty(colours, type, { get: () => colour, set() {}, enumerable: true, configurable: true });
            }
        }
    },
});
