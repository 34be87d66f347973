// A parser of Prometheus's text format, as far as this page needs it.

// The prefix of a name (vllm: or stu:) is a setting of the server.
const SAMPLE = /^(?:\w+:)?(\w+)(?:\{(.*)\})? (\S+)$/;
const BOUND = /(?:^|,)le="([^"]*)"/;

/**
 * Return values, by name without prefix, summed over labels; and buckets of each histogram: the
 * counts up to each upper bound.
 */
export function parseMetrics(text) {
  const values = new Map();
  const buckets = new Map();
  for (const line of text.split("\n")) {
    const found = SAMPLE.exec(line);
    if (!found) continue;
    const [, name, labels = "", written] = found;
    const bound = BOUND.exec(labels)?.[1];
    if (bound === undefined) {
      add(values, name, number(written));
    } else {
      if (!buckets.has(name)) buckets.set(name, new Map());
      add(buckets.get(name), number(bound), number(written));
    }
  }
  return { values, buckets };
}

function add(map, key, value) {
  map.set(key, (map.get(key) ?? 0) + value);
}

function number(written) {
  return Number(written.replace("Inf", "Infinity"));
}
