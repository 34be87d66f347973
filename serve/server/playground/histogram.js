// Latencies as a bar chart.

import { duration } from "./latencies.js";

const WIDTH = 320;
const HEIGHT = 140;
const LEFT = 4;
const TOP = 18;
const BOTTOM = 24;
const GAP = 4;
const FEWEST_BARS = 6;
const MOST_LABELS = 6;

/** Draw the buckets that are not empty, with some beside them if they are few. */
export function drawHistogram(svg, latencies) {
  svg.toggleAttribute("hidden", latencies.total === 0);
  if (latencies.total === 0) return;
  const { bounds, counts } = latencies;
  const [from, to] = shownRange(counts);
  const shown = counts.slice(from, to);
  const most = Math.max(...shown, 1);
  const step = (WIDTH - 2 * LEFT) / shown.length;
  const floor = HEIGHT - BOTTOM;
  const labelStep = Math.ceil(shown.length / MOST_LABELS);
  const shapes = [make("line", { x1: LEFT, x2: WIDTH - LEFT, y1: floor, y2: floor })];
  shown.forEach((count, at) => {
    const x = LEFT + at * step;
    const height = ((floor - TOP) * count) / most;
    const middle = x + step / 2;
    const box = { x: x + GAP / 2, y: floor - height, width: step - GAP, height, rx: 2 };
    shapes.push(make("rect", box));
    if (count) shapes.push(make("text", { x: middle, y: floor - height - 5 }, short(count)));
    if (at % labelStep === 0) {
      shapes.push(make("text", { x: middle, y: HEIGHT - 8 }, label(bounds, from + at)));
    }
  });
  svg.replaceChildren(...shapes);
}

function shownRange(counts) {
  let from = counts.findIndex((count) => count > 0);
  let to = counts.findLastIndex((count) => count > 0) + 1;
  while (to - from < FEWEST_BARS) {
    if (from > 0) from -= 1;
    if (to < counts.length) to += 1;
  }
  return [from, to];
}

function label(bounds, at) {
  return bounds[at] === Infinity ? "more" : `≤${duration(bounds[at]).replace(" ", "")}`;
}

function short(count) {
  return count < 10000 ? String(count) : `${Math.round(count / 1000)}k`;
}

function make(name, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}
