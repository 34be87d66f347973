// Times between tokens since the page was opened.

/** Counts in buckets, from a histogram that the server has counted since its start. */
export class Latencies {
  #before = null;
  /** Upper bounds in seconds, the last one Infinity. */
  bounds = [];
  /** Count of each bucket. */
  counts = [];

  /** buckets: current counts up to each upper bound. */
  add(buckets) {
    const sorted = [...buckets].sort(([one], [other]) => one - other);
    const cumulative = sorted.map(([, count]) => count);
    const counts = cumulative.map((count, at) => count - (cumulative[at - 1] ?? 0));
    if (this.#before === null) {
      this.bounds = sorted.map(([bound]) => bound);
      this.counts = counts.map(() => 0);
    } else {
      // A server that has restarted counts from 0.
      const isReset = counts.some((count, at) => count < this.#before[at]);
      const before = isReset ? counts.map(() => 0) : this.#before;
      this.counts = this.counts.map((count, at) => count + counts[at] - before[at]);
    }
    this.#before = counts;
  }

  get total() {
    return this.counts.reduce((sum, count) => sum + count, 0);
  }

  /** Return a quantile in seconds, as if times were spread evenly in each bucket. */
  quantile(share) {
    let left = share * this.total;
    for (const [at, count] of this.counts.entries()) {
      const lower = this.bounds[at - 1] ?? 0;
      if (count >= left && count > 0) {
        const upper = this.bounds[at];
        return upper === Infinity ? lower : lower + ((upper - lower) * left) / count;
      }
      left -= count;
    }
    return 0;
  }

  /** p50 and p99, in words. */
  get summary() {
    if (this.total === 0) return "No tokens since this page was opened";
    const [half, most] = [0.5, 0.99].map((share) => duration(this.quantile(share)));
    return `p50 ${half}, p99 ${most}, of ${this.total.toLocaleString("en")} since this page was opened`;
  }
}

/** Return a time in milliseconds or seconds, with two significant digits. */
export function duration(seconds) {
  const [value, unit] = seconds < 1 ? [seconds * 1000, "ms"] : [seconds, "s"];
  return `${value < 10 ? Number(value.toPrecision(2)) : Math.round(value)} ${unit}`;
}
