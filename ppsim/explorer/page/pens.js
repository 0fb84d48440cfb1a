// Pens: one way to draw, on a canvas or as SVG, so that what is saved is what is shown.

export const FONT = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif";

/** Draws on a canvas. Coordinates are CSS pixels. */
export class CanvasPen {
  constructor(context) {
    this.context = context;
  }

  rect(x, y, width, height, fill, { alpha = 1, radius = 0 } = {}) {
    const c = this.context;
    c.globalAlpha = alpha;
    c.fillStyle = fill;
    if (radius > 0 && width > 2 * radius) {
      c.beginPath();
      c.roundRect(x, y, width, height, radius);
      c.fill();
    } else {
      c.fillRect(x, y, width, height);
    }
    c.globalAlpha = 1;
  }

  frame(x, y, width, height, stroke, { line = 1, dash = [] } = {}) {
    const c = this.context;
    c.strokeStyle = stroke;
    c.lineWidth = line;
    c.setLineDash(dash);
    c.strokeRect(x, y, width, height);
    c.setLineDash([]);
  }

  line(points, stroke, { line = 1, dash = [], alpha = 1 } = {}) {
    const c = this.context;
    c.globalAlpha = alpha;
    c.strokeStyle = stroke;
    c.lineWidth = line;
    c.lineJoin = "round";
    c.setLineDash(dash);
    c.beginPath();
    points.forEach(([x, y], index) => (index ? c.lineTo(x, y) : c.moveTo(x, y)));
    c.stroke();
    c.setLineDash([]);
    c.globalAlpha = 1;
  }

  area(points, fill, { alpha = 1 } = {}) {
    const c = this.context;
    c.globalAlpha = alpha;
    c.fillStyle = fill;
    c.beginPath();
    points.forEach(([x, y], index) => (index ? c.lineTo(x, y) : c.moveTo(x, y)));
    c.fill();
    c.globalAlpha = 1;
  }

  text(x, y, text, fill, { size = 12, weight = 400, align = "left" } = {}) {
    const c = this.context;
    c.fillStyle = fill;
    c.font = `${weight} ${size}px ${FONT}`;
    c.textAlign = align;
    c.textBaseline = "middle";
    c.fillText(text, x, y);
  }

  clip(x, y, width, height, work) {
    const c = this.context;
    c.save();
    c.beginPath();
    c.rect(x, y, width, height);
    c.clip();
    work();
    c.restore();
  }
}

const escaped = (text) =>
  String(text).replace(/[&<>"']/g, (each) => `&#${each.charCodeAt(0)};`);
const n = (value) => Number(value.toFixed(2));

/** Writes SVG. */
export class SvgPen {
  constructor(width, height, paper) {
    this.size = [width, height];
    this.parts = [];
    this.clips = 0;
    this.rect(0, 0, width, height, paper);
  }

  rect(x, y, width, height, fill, { alpha = 1, radius = 0 } = {}) {
    const more = (alpha < 1 ? ` fill-opacity="${alpha}"` : "") + (radius && width > 2 * radius ? ` rx="${radius}"` : "");
    this.parts.push(
      `<rect x="${n(x)}" y="${n(y)}" width="${n(Math.max(width, 0))}" height="${n(height)}" fill="${fill}"${more}/>`,
    );
  }

  frame(x, y, width, height, stroke, { line = 1, dash = [] } = {}) {
    this.parts.push(
      `<rect x="${n(x)}" y="${n(y)}" width="${n(width)}" height="${n(height)}" fill="none" stroke="${stroke}"` +
        ` stroke-width="${line}"${dash.length ? ` stroke-dasharray="${dash}"` : ""}/>`,
    );
  }

  line(points, stroke, { line = 1, dash = [], alpha = 1 } = {}) {
    this.parts.push(
      `<polyline points="${points.map(([x, y]) => `${n(x)},${n(y)}`).join(" ")}" fill="none" stroke="${stroke}"` +
        ` stroke-width="${line}"${dash.length ? ` stroke-dasharray="${dash}"` : ""}` +
        `${alpha < 1 ? ` stroke-opacity="${alpha}"` : ""}/>`,
    );
  }

  area(points, fill, { alpha = 1 } = {}) {
    this.parts.push(
      `<polygon points="${points.map(([x, y]) => `${n(x)},${n(y)}`).join(" ")}" fill="${fill}"` +
        `${alpha < 1 ? ` fill-opacity="${alpha}"` : ""}/>`,
    );
  }

  text(x, y, text, fill, { size = 12, weight = 400, align = "left" } = {}) {
    const anchor = { left: "start", center: "middle", right: "end" }[align];
    this.parts.push(
      `<text x="${n(x)}" y="${n(y)}" fill="${fill}" font-size="${size}"${weight === 400 ? "" : ` font-weight="${weight}"`}` +
        ` text-anchor="${anchor}" dominant-baseline="central">${escaped(text)}</text>`,
    );
  }

  clip(x, y, width, height, work) {
    this.clips += 1;
    this.parts.push(
      `<clipPath id="clip${this.clips}"><rect x="${n(x)}" y="${n(y)}" width="${n(width)}" height="${n(height)}"/></clipPath>`,
      `<g clip-path="url(#clip${this.clips})">`,
    );
    work();
    this.parts.push("</g>");
  }

  toString() {
    const [width, height] = this.size;
    return (
      `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}"` +
      ` font-family="${escaped(FONT)}">\n${this.parts.join("\n")}\n</svg>\n`
    );
  }
}
