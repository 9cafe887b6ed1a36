// Checks of accessibility that need computed styles; each returns a list of findings in words.
// Run as the body of a function whose argument is the check's name.

const shownElements = () => [...document.body.querySelectorAll("*")].filter((element) => {
  const box = element.getBoundingClientRect();
  return box.width > 1 && box.height > 1 && element.checkVisibility({ visibilityProperty: true });
});
const CONTROLS = "a[href], button, input, select, textarea, summary";
const nameOf = (element) => `${element.tagName.toLowerCase()}#${element.id || element.closest("[id]")?.id} `
  + `“${(element.textContent || element.placeholder || "").trim().slice(0, 30)}”`;

function color(text) {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  canvas.fillStyle = text;
  canvas.fillRect(0, 0, 1, 1);
  const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
  return [red, green, blue, alpha / 255];
}

function backgroundOf(element) {
  const layers = [];
  for (let at = element; at; at = at.parentElement) {
    layers.push(color(getComputedStyle(at).backgroundColor));
    if (layers.at(-1)[3] === 1) break;
  }
  return layers.reverse().reduce((below, [red, green, blue, alpha]) => [red, green, blue].map(
    (value, index) => value * alpha + below[index] * (1 - alpha)), [255, 255, 255]);
}

function luminance(rgb) {
  const [red, green, blue] = rgb.map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

function contrast(first, second) {
  const [low, high] = [luminance(first), luminance(second)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}

function ring(element) {
  const { outlineStyle, outlineWidth, outlineColor, outlineOffset } = getComputedStyle(element);
  return [outlineStyle, outlineWidth, outlineColor, outlineOffset].join(" ");
}

const checks = {
  text_contrast() {
    const findings = [];
    for (const element of shownElements()) {
      const style = getComputedStyle(element);
      const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
      const texts = own ? [["text", style.color]] : [];
      if (element.placeholder) texts.push(["placeholder", getComputedStyle(element, "::placeholder").color]);
      if (element.value && element.matches("input, textarea, select")) texts.push(["value", style.color]);
      const size = parseFloat(style.fontSize);
      const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
      for (const [kind, text] of texts) {
        const ratio = contrast(color(text).slice(0, 3), backgroundOf(element));
        if (ratio < (large ? 3 : 4.5)) findings.push(`${kind} of ${nameOf(element)}: ${ratio.toFixed(2)}`);
      }
    }
    return findings;
  },

  border_contrast() {
    return shownElements().filter((element) => element.matches("input:not([type=checkbox]), select, textarea"))
      .map((element) => [element, contrast(
        color(getComputedStyle(element).borderTopColor).slice(0, 3), backgroundOf(element.parentElement))])
      .filter(([, ratio]) => ratio < 3).map(([element, ratio]) => `${nameOf(element)}: ${ratio.toFixed(2)}`);
  },

  labels() {
    return shownElements().filter((element) => element.matches("input, select, textarea"))
      .filter((element) => element.labels.length === 0).map(nameOf);
  },

  references() {
    const findings = [];
    for (const attribute of ["aria-labelledby", "aria-describedby", "for", "form"]) {
      for (const element of document.querySelectorAll(`[${attribute}]`)) {
        for (const id of element.getAttribute(attribute).split(/\s+/)) {
          if (!document.getElementById(id)) findings.push(`${attribute}="${id}" of ${nameOf(element)}`);
        }
      }
    }
    return findings;
  },

  ids() {
    const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
    return ids.filter((id, index) => ids.indexOf(id) !== index);
  },

  headings() {
    const levels = [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")]
      .filter((heading) => heading.checkVisibility()).map((heading) => Number(heading.tagName[1]));
    const findings = levels.filter((level, index) => level > (levels[index - 1] ?? 0) + 1)
      .map((level) => `h${level} comes too deep: ${levels}`);
    if (levels.filter((level) => level === 1).length !== 1) findings.push(`not one h1: ${levels}`);
    return findings;
  },

  landmarks() {
    const findings = [];
    if (!document.documentElement.lang) findings.push("no language");
    if (!document.title) findings.push("no title");
    if (document.querySelectorAll("main").length !== 1) findings.push("not one main");
    for (const element of document.body.children) {
      if (!element.matches("header, main, footer, nav, .skip, [aria-hidden=true], script")) {
        findings.push(`${nameOf(element)} is in no landmark`);
      }
    }
    if (document.querySelector("[tabindex]:not([tabindex='0'], [tabindex='-1'])")) findings.push("tabindex above 0");
    return findings;
  },

  target_size() {
    return shownElements().filter((element) => element.matches(CONTROLS))
      .map((element) => [element, element.getBoundingClientRect()])
      .filter(([, box]) => box.width < 24 || box.height < 24)
      .map(([element, box]) => `${nameOf(element)}: ${box.width.toFixed(1)} x ${box.height.toFixed(1)}`);
  },

  focus_ring() {
    const element = document.activeElement;
    const style = getComputedStyle(element);
    const ratio = contrast(color(style.outlineColor).slice(0, 3), backgroundOf(element.parentElement));
    const box = element.getBoundingClientRect();
    const findings = [];
    if (style.outlineStyle === "none" || parseFloat(style.outlineWidth) < 2) findings.push(`no ring: ${nameOf(element)}`);
    const focused = ring(element);
    element.blur();
    if (ring(element) === focused) findings.push(`looks the same without the focus: ${nameOf(element)}`);
    element.focus({ focusVisible: true });
    if (ratio < 3) findings.push(`faint ring (${ratio.toFixed(2)}): ${nameOf(element)}`);
    if (box.bottom < 0 || box.top > innerHeight) findings.push(`out of sight: ${nameOf(element)}`);
    return findings;
  },

  sideways() {
    const width = document.scrollingElement.clientWidth;
    if (document.scrollingElement.scrollWidth <= width) return [];
    const wide = (element) => element.getBoundingClientRect().right > width + 1
      || (element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).display !== "inline");
    return [`wider than ${width}`, ...shownElements().filter(wide).map(nameOf)];
  },

  motion() {
    const animated = (element, part) => getComputedStyle(element, part).animationName !== "none"
      || parseFloat(getComputedStyle(element, part).transitionDuration) > 0;
    return shownElements().filter((element) => animated(element) || animated(element, "::after")).map(nameOf);
  },

  dark() {
    const light = luminance(backgroundOf(document.body));
    return light < 0.05 ? [] : [`the background's luminance is ${light}`];
  },
};

return checks[arguments[0]]();
