// Elements: the page's own are found and made here. Text is always set as text, so nothing that is shown can be code.

export const find = (id) => document.getElementById(id);

/** A new element; properties are set on it, "class" and names with a dash as attributes. */
export function make(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class" || key.includes("-")) element.setAttribute(key, value);
    else if (key === "style") Object.assign(element.style, value);
    else element[key] = value;
  }
  element.append(...children.filter((each) => each !== null && each !== undefined && each !== ""));
  return element;
}

/** A small square of a colour. */
export const swatch = (colour) => make("span", { class: "swatch", "aria-hidden": "true", style: { background: colour } });

/** Offer something as a file. */
export function download(name, data, type) {
  const address = URL.createObjectURL(data instanceof Blob ? data : new Blob([data], { type }));
  const link = make("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
