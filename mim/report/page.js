"use strict";
// Hover values of the charts, by pointer and by arrow keys; and a live page that replaces itself when there is more.
(() => {
  const LEFT = 52, WIDTH = 440, TOP = 14, BASE = 208;
  const SVG = "http://www.w3.org/2000/svg";

  function short(value, percent) {
    const shown = percent ? 100 * value : value, size = Math.abs(shown);
    const text = size && (size >= 1e9 || size < 1e-4) ? shown.toExponential(3)
      : shown.toLocaleString("en", size >= 1000 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 4 });
    return percent ? text + " %" : text;
  }

  function nearest(points, step) {
    let low = 0, high = points.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < step) low = middle; else high = middle;
    }
    return Math.abs(points[low][0] - step) <= Math.abs(points[high][0] - step) ? points[low] : points[high];
  }

  function clear(svg) {
    svg.querySelector(".hover").replaceChildren();
    svg.parentNode.querySelectorAll(".tip").forEach((tip) => tip.remove());
  }

  function show(svg, wanted) {
    const chart = JSON.parse(svg.dataset.chart), hover = svg.querySelector(".hover");
    const found = chart.curves.filter((curve) => curve.points.length).map((curve) => [curve, nearest(curve.points, wanted)]);
    clear(svg);
    if (!found.length) return;
    const step = found.map(([, point]) => point[0]).reduce((a, b) => Math.abs(a - wanted) <= Math.abs(b - wanted) ? a : b);
    svg.dataset.step = step;
    const x = LEFT + (step - chart.first) / (chart.last - chart.first) * (chart.right - LEFT);
    const line = document.createElementNS(SVG, "line");
    for (const [name, value] of [["x1", x], ["x2", x], ["y1", TOP], ["y2", BASE]]) line.setAttribute(name, value);
    hover.append(line);
    const tip = document.createElement("div");
    tip.className = "tip";
    const title = document.createElement("b");
    title.textContent = "step " + short(step, false);
    tip.append(title);
    for (const [curve, point] of found) {
      const row = document.createElement("div"), dot = document.createElement("i");
      dot.className = "c" + curve.colour;
      const at = point[0] === step ? "" : " (step " + short(point[0], false) + ")";
      row.append(dot, (curve.label ? curve.label + " " : "") + short(point[1], chart.percent) + at);
      tip.append(row);
    }
    svg.parentNode.append(tip);
    const box = svg.getBoundingClientRect(), card = svg.parentNode.getBoundingClientRect();
    const place = box.left - card.left + x / WIDTH * box.width;
    const left = place + tip.offsetWidth + 16 > card.width ? place - tip.offsetWidth - 10 : place + 10;
    tip.style.left = Math.max(4, Math.min(left, card.width - tip.offsetWidth - 4)) + "px";
    tip.style.top = box.top - card.top + 4 + "px";
  }

  const charted = (event) => event.target.closest ? event.target.closest("svg[data-chart]") : null;
  for (const kind of ["pointermove", "pointerdown"]) {
    document.addEventListener(kind, (event) => {
      const svg = charted(event);
      document.querySelectorAll("svg[data-chart] .hover:not(:empty)").forEach((hover) => {
        if (hover.ownerSVGElement !== svg) clear(hover.ownerSVGElement);
      });
      if (!svg) return;
      const chart = JSON.parse(svg.dataset.chart), box = svg.getBoundingClientRect();
      const share = ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (chart.right - LEFT);
      show(svg, chart.first + share * (chart.last - chart.first));
    });
  }
  document.addEventListener("keydown", (event) => {
    const svg = charted(event), by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (svg && event.key === "Escape") clear(svg);
    if (!svg || !by) return;
    event.preventDefault();
    const chart = JSON.parse(svg.dataset.chart);
    const steps = [...new Set(chart.curves.flatMap((curve) => curve.points.map((point) => point[0])))].sort((a, b) => a - b);
    const at = steps.indexOf(Number(svg.dataset.step ?? NaN));
    show(svg, steps[Math.max(0, Math.min(steps.length - 1, at < 0 ? (by > 0 ? 0 : steps.length - 1) : at + by))]);
  });
  document.addEventListener("focusout", (event) => { const svg = charted(event); if (svg) clear(svg); });

  if (!document.documentElement.hasAttribute("data-live")) return;
  let version = null;
  async function refresh() {
    try {
      const answer = await fetch("/", { headers: version ? { "If-None-Match": version } : {}, cache: "no-store" });
      if (answer.status === 200) {
        const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main");
        if (version && fresh) {
          const main = document.querySelector("main"), open = [...main.querySelectorAll("details")].map((one) => one.open);
          const details = [...fresh.querySelectorAll("details")];
          if (details.length === open.length) details.forEach((one, number) => { one.open = open[number]; });
          const at = window.scrollY;
          main.replaceWith(document.adoptNode(fresh));
          window.scrollTo({ top: at, behavior: "instant" });
        }
        version = answer.headers.get("ETag");
      }
      document.documentElement.classList.toggle("lost", answer.status >= 400);
    } catch { document.documentElement.classList.add("lost"); }
    setTimeout(refresh, 5000);
  }
  refresh();
})();
