// Save: the order, the steps and the picture as files.

import { LIGHT } from "./colours.js";
import { drawAll } from "./draw.js";
import { download, find } from "./elements.js";
import { CanvasPen, SvgPen } from "./pens.js";
import { limitBytes, question } from "./state.js";

export function saveButtons(page) {
  const name = () => (page.state.csv ? "order" : `${page.state.schedule}-${page.state.ranks}x${page.state.microbatches}`);
  const inside = { theme: LIGHT, get choices() { return page.choices; }, get state() { return page.state; }, get limit() { return limitBytes(page.state); } };
  const layout = () => page.layoutFor(Math.max(find("timeline").clientWidth, 900));

  find("save-csv").addEventListener("click", () => {
    if (page.order) download(`${name()}.csv`, page.order, "text/csv");
  });

  find("save-perfetto").addEventListener("click", async () => {
    const { state } = page;
    const steps = {};
    for (const view of page.views) {
      if (view.key === "run") steps[view.title] = state.run;
      else if (!view.isBad) steps[view.title] = question(state, view.key === "second");
      if (view.tracks.length > 1) steps.measured = state.run;
    }
    const response = await fetch("perfetto", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(steps) });
    if (response.headers.get("Content-Type").startsWith("application/octet-stream")) download(`${name()}.json`, await response.blob());
  });

  find("save-svg").addEventListener("click", () => {
    const at = layout();
    const pen = new SvgPen(at.width, Math.ceil(at.height), LIGHT.paper);
    drawAll(pen, at, inside);
    download(`${name()}.svg`, String(pen), "image/svg+xml");
  });

  find("save-png").addEventListener("click", () => {
    const at = layout();
    const canvas = document.createElement("canvas");
    const scale = Math.min(2, 16000 / at.height);
    canvas.width = Math.round(at.width * scale);
    canvas.height = Math.round(at.height * scale);
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    const pen = new CanvasPen(context);
    pen.rect(0, 0, at.width, at.height, LIGHT.paper);
    drawAll(pen, at, inside);
    canvas.toBlob((blob) => download(`${name()}.png`, blob), "image/png");
  });
}
