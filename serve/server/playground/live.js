// Live figures of the server.

import { drawHistogram } from "./histogram.js";
import { Latencies } from "./latencies.js";
import { parseMetrics } from "./prometheus.js";

const UNKNOWN = "–";

/** Shows the metrics of the server. */
export class Live {
  #latencies = new Latencies();
  #before = null;

  /** Show the current text of /metrics. */
  show(text) {
    const { values, buckets } = parseMetrics(text);
    write("running", values.get("num_requests_running"));
    write("waiting", values.get("num_requests_waiting"));
    write("rate", this.#rate(values.get("generation_tokens_total")));
    write("remembered", share(values, "prefix_cache_hits_total", "prefix_cache_queries_total"));
    for (const kind of ["convolution", "attention"]) {
      showPages(kind, values.get(`${kind}_pages_used`), values.get(`${kind}_pages`));
    }
    this.#latencies.add(buckets.get("inter_token_latency_seconds_bucket") ?? new Map());
    write("latency", this.#latencies.summary);
    drawHistogram(document.getElementById("histogram"), this.#latencies);
  }

  /** Show that nothing is known now. The latencies so far remain. */
  blank() {
    this.#before = null;
    for (const name of ["running", "waiting", "rate", "remembered"]) write(name);
    for (const kind of ["convolution", "attention"]) showPages(kind);
  }

  #rate(count) {
    const now = performance.now();
    const { count: earlier, at } = this.#before ?? { count, at: now };
    this.#before = { count, at: now };
    if (count === undefined || now === at) return undefined;
    // A server that has restarted counts from 0.
    const perSecond = (1000 * (count < earlier ? count : count - earlier)) / (now - at);
    return perSecond < 10 ? Number(perSecond.toFixed(1)) : Math.round(perSecond);
  }
}

function share(values, part, whole) {
  const count = values.get(whole);
  if (count === undefined) return undefined;
  return count === 0 ? "none yet" : `${Math.round((100 * values.get(part)) / count)}%`;
}

function showPages(kind, used, total) {
  const share = total ? used / total : 0;
  document.getElementById(`${kind}-bar`).setAttribute("width", `${100 * share}%`);
  const inWords = total === 0 ? "none needed" : `${plain(used)} of ${plain(total)}`;
  write(`${kind}-pages`, total === undefined ? undefined : inWords);
}

function write(id, value) {
  const element = document.getElementById(id);
  const text = typeof value === "string" ? value : plain(value);
  if (element.textContent !== text) element.textContent = text;
}

function plain(value) {
  return value === undefined ? UNKNOWN : value.toLocaleString("en");
}
