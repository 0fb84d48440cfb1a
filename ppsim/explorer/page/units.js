// Units: seconds and bytes in the unit that suits their size.

const TIMES = [["s", 1], ["ms", 1e3], ["µs", 1e6], ["ns", 1e9]];
const SIZES = [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10], ["B", 1]];

/** The unit in which the longest time is 1 or more: its name and factor. */
export function timeUnit(longest) {
  const found = TIMES.find(([, factor]) => longest * factor >= 1);
  const [name, factor] = found ?? (longest > 0 ? TIMES.at(-1) : TIMES[0]);
  return { name, factor };
}

/** A number to four significant digits. */
export function digits(value) {
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (size >= 1e4) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

export function timeText(seconds) {
  const unit = timeUnit(Math.abs(seconds));
  return `${digits(seconds * unit.factor)} ${unit.name}`;
}

export function bytesText(bytes) {
  const [name, factor] = SIZES.find(([, each]) => bytes >= each) ?? SIZES.at(-1);
  return `${digits(bytes / factor)} ${name}`;
}

export const share = (value) => `${(100 * value).toFixed(1)} %`;

/** Round values that part a range into about `count` steps. */
export function ticks(from, to, count) {
  const raw = (to - from) / Math.max(count, 1);
  if (!(raw > 0)) return [];
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= raw * 0.999);
  const found = [];
  for (let index = Math.ceil(from / step - 1e-9); index * step <= to + step * 1e-9; index += 1) {
    found.push(index * step);
  }
  return found;
}
