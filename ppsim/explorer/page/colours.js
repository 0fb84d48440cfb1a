// Colours: of bars, by kind or by microbatch; those of the kinds come from the server, which has them for all figures.

// Viridis (van der Walt and Smith, 2015): even steps of lightness, told apart under every common colour blindness.
const VIRIDIS = ["#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];

const parts = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
const joined = (numbers) => `#${numbers.map((each) => Math.round(each).toString(16).padStart(2, "0")).join("")}`;

/** A mixture of two colours; share 0 is the first. */
export function mixed(one, other, share) {
  const [a, b] = [parts(one), parts(other)];
  return joined(a.map((each, index) => each + (b[index] - each) * share));
}

/** Black or white, whichever is legible on a colour. */
export function inkOn(colour) {
  const [r, g, b] = parts(colour).map((each) => (each / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.19 ? "#000000" : "#ffffff";
}

function viridis(share) {
  const at = share * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return mixed(VIRIDIS[low], VIRIDIS[low + 1], at - low);
}

/** A function that gives a row's colour. Later stages of a rank are lighter. */
export function painter(picture, kinds, by) {
  const { kind, stage, microbatch } = picture.rows;
  const cache = new Map();
  return (row) => {
    const key = by === "kind" ? kind[row] * 4096 + picture.chunk[stage[row]] : microbatch[row];
    let colour = cache.get(key);
    if (!colour) {
      const lighter = (0.5 * picture.chunk[stage[row]]) / Math.max(picture.chunks - 1, 1);
      colour = by === "kind"
        ? mixed(kinds[kind[row]].colour, "#ffffff", picture.chunks > 1 ? lighter : 0)
        : viridis(microbatch[row] / Math.max(picture.microbatches - 1, 1));
      cache.set(key, colour);
    }
    return colour;
  };
}

/** The page's own colours, light or dark. */
export function theme() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    ink: read("ink"), soft: read("soft"), line: read("line"), paper: read("paper"), idle: read("idle"),
    strip: read("strip"), over: read("over"), mark: read("mark"), bad: read("bad"),
  };
}

export const LIGHT = {
  ink: "#1c2530", soft: "#5a6675", line: "#d9dee5", paper: "#ffffff", idle: "#eef1f5",
  strip: "#b9c4d2", over: "#d55e00", mark: "#111827", bad: "#c81e1e",
};
