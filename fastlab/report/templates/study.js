"use strict";
// The page is whole without this script. It shows the values under the pointer at once, hides
// curves and points at a click on their name in a legend, and switches losses to a logarithmic axis.

const tip = document.body.appendChild(document.createElement("div"));
tip.className = "tip";
tip.hidden = true;

for (const title of document.querySelectorAll("svg title")) {
  title.parentElement.dataset.tip = title.textContent;
  title.remove();
}

addEventListener("pointerover", (event) => {
  const shown = event.target.closest("[data-tip]");
  tip.hidden = !shown;
  if (!shown) return;
  tip.textContent = shown.dataset.tip;
  const place = (position, size, end) => Math.max(4, Math.min(position + 12, end - size - 4));
  tip.style.left = `${place(event.clientX, tip.offsetWidth, document.documentElement.clientWidth)}px`;
  tip.style.top = `${place(event.clientY, tip.offsetHeight, innerHeight)}px`;
});
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

// A legend's buttons: each hides the elements of its section that carry its number.
function toggles(items, elements) {
  items.forEach((item, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...item.childNodes);
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      const pressed = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", pressed);
      for (const element of elements(index)) element.style.display = pressed ? "" : "none";
    });
    item.append(button);
  });
}

for (const section of document.querySelectorAll(".study")) {
  const groups = [...section.querySelectorAll(".plots .plot")].map((plot) => ({
    curves: plot.querySelectorAll(".curves > g"),  // two for each row: training and validation
    bands: plot.querySelectorAll(".bands > polygon"),
  }));
  toggles(section.querySelectorAll(".legend li:not(.key)"), (row) => groups.flatMap(
    ({ curves, bands }) => [curves[2 * row], curves[2 * row + 1], bands[row]],
  ).filter(Boolean));
  const loss = section.querySelector(".plots figure");
  if (loss) offerLogarithm(loss);
}
const scatter = document.querySelector(".scatter");
if (scatter) {
  const items = [...scatter.querySelectorAll(".legend li")];
  toggles(items, (index) => scatter.querySelectorAll(`.point[data-study="${items[index].dataset.study}"]`));
}

// The linear axis is read from its first and last tick; the logarithmic one begins at the lowest
// value that is drawn.
function offerLogarithm(figure) {
  const svg = figure.querySelector("svg");
  const ticks = [...svg.querySelectorAll("text[text-anchor=end]")];
  const lines = [...svg.querySelectorAll(".grid")];
  const places = lines.map((line) => Number(line.getAttribute("y1")));
  const values = ticks.map((tick) => Number(tick.textContent.replaceAll(",", "")));
  const [bottom, top] = [places[0], places.at(-1)];
  const [low, high] = [values[0], values.at(-1)];
  const drawn = [...svg.querySelectorAll("polyline, polygon")].filter((e) => e.getAttribute("points"));
  const marks = [...svg.querySelectorAll(".curves path:not(.arrow)")];
  const points = drawn.map((e) => e.getAttribute("points").split(" ").map((p) => p.split(",").map(Number)));
  const moves = marks.map((e) => e.getAttribute("transform").match(/-?[\d.]+/g).map(Number));
  const value = (y) => low + (high - low) * (bottom - y) / (bottom - top);
  const least = Math.min(...points.flat().map(([, y]) => value(y)).filter((v) => v > 0));
  if (!(least < high)) return;
  const logarithm = (v) => bottom + (top - bottom) * Math.log(Math.max(v, least) / least) / Math.log(high / least);

  const box = document.createElement("input");
  box.type = "checkbox";
  const label = document.createElement("label");
  label.className = "choice";
  label.append(box, " logarithmic");
  figure.querySelector("figcaption").append(label);
  box.addEventListener("change", () => {
    const move = (y) => (box.checked ? logarithm(value(y)) : y).toFixed(2);
    drawn.forEach((e, i) => e.setAttribute("points", points[i].map(([x, y]) => `${x},${move(y)}`).join(" ")));
    marks.forEach((e, i) => e.setAttribute("transform", `translate(${moves[i][0]} ${move(moves[i][1])})`));
    lines.forEach((line, i) => {
      const shown = !box.checked || values[i] >= least;
      for (const e of [line, ticks[i]]) e.style.display = shown ? "" : "none";
      line.setAttribute("y1", move(places[i]));
      line.setAttribute("y2", move(places[i]));
      ticks[i].setAttribute("y", Number(move(places[i])) + 5);
    });
  });
}

// A link to a run opens what holds it, in every browser.
function openTarget() {
  document.getElementById(decodeURIComponent(location.hash.slice(1)))?.closest("details")?.setAttribute("open", "");
}
addEventListener("hashchange", openTarget);
openTarget();
