// Numbers: what a step takes, a row for each timeline.

import { partName } from "./card.js";
import { make, swatch } from "./elements.js";
import { bytesText, share, timeText } from "./units.js";

/** rows: [{ title, picture }], limit in bytes or null. */
export function numbersOf(rows, limit, choices) {
  const first = rows[0]?.picture.numbers;
  return rows.map(({ title, picture }, index) => {
    const { makespan, bubble, peak, rankTime, parts } = picture.numbers;
    const facts = make("dl", { class: "facts" });
    const add = (term, value, more = "") =>
      facts.append(make("div", {}, make("dt", {}, term), make("dd", {}, value, more ? make("small", {}, more) : "")));
    if (bubble === undefined) {
      return make("article", { class: "result" }, make("h2", {}, title), make("p", { class: "quiet" }, "Below, its actions stand one after another, without waiting."));
    }
    add("step", timeText(makespan), index && first.bubble !== undefined ? difference(makespan, first.makespan) : "");
    add("bubble", share(bubble));
    add("longest rank", timeText(Math.max(...rankTime)));
    const most = peak ? Math.max(...peak) : null;
    const over = limit === null || !peak ? [] : peak.flatMap((bytes, rank) => (bytes > limit ? [rank] : []));
    if (peak) add("peak activations", bytesText(most), `on rank ${peak.indexOf(most)}`);
    else add("peak activations", "unknown");
    const article = make("article", { class: "result" }, make("h2", {}, title), facts);
    if (over.length) {
      const named = over.length === 1 ? `rank ${over[0]}` : `ranks ${over.slice(0, 6).join(", ")}${over.length > 6 ? " ..." : ""}`;
      article.append(make("p", { class: "bad over" }, `Over the limit of ${bytesText(limit)} on ${named}.`));
    }
    const used = Object.entries(parts).filter(([, each]) => each >= 0.0005);
    const label = used.map(([part, each]) => `${partName(part)} ${share(each)}`).join(", ");
    article.append(
      make("div", { class: "stack", role: "img", "aria-label": `bubble: ${label || "none"}` },
        ...used.map(([part, each]) => make("span", { style: { width: `${100 * each}%`, background: choices.parts[part] } }))),
      make("p", { class: "parts-line" },
        ...(used.length ? used.map(([part, each]) => make("span", {}, swatch(choices.parts[part]), `${partName(part)} ${share(each)}`)) : ["no bubble"])),
    );
    return article;
  });
}

function difference(value, base) {
  const change = value / base - 1;
  if (Math.abs(change) < 5e-5) return "the same";
  return `${Math.abs(100 * change).toFixed(1)} % ${change < 0 ? "shorter" : "longer"}`;
}
