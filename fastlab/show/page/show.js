"use strict";

const at = (id) => document.getElementById(id);
const percent = (share) => (share === null ? "not a number" : `${(100 * share).toFixed(1)} %`);
let about = {};
let classes = [];
let asked = 0; // pictures that were given so far: only the last one is shown
let choice = { label: null, guess: null, start: 0 };

/** An element with properties and children. Texts are set as text: names of classes may hold anything. */
function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** The answer of an address of this server; throws an Error with what it reports. */
async function ask(address, options) {
  let answer;
  try {
    answer = await fetch(address, options);
  } catch {
    throw new Error("The server does not answer. Was it stopped?");
  }
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error);
  return value;
}

function bar(share) {
  const filled = make("span", {});
  filled.style.width = `${100 * (share ?? 0)}%`;
  const track = make("span", { className: "track" }, filled);
  track.setAttribute("aria-hidden", "true");
  return track;
}

/** A picture with the most probable classes; `truth` is its class where that is known. */
function card(png, alt, title, verdict, predicted, truth) {
  const image = make("img", { src: `data:image/png;base64,${png}`, alt });
  const lines = predicted.map(({ name, probability }) =>
    make(
      "li",
      { className: name === truth ? "true" : "" },
      make("span", {}, name),
      make("span", { className: "probability" }, percent(probability)),
      bar(probability),
    ),
  );
  const facts = [
    make("p", { className: "label" }, title),
    make("p", { className: "verdict" }, verdict),
    make("ol", {}, ...lines),
  ];
  return make("li", {}, image, make("div", { className: "facts" }, ...facts));
}

async function predict(file) {
  const number = ++asked;
  at("problem").textContent = "";
  at("seen").replaceChildren(make("li", {}, "The picture is being classified."));
  try {
    const limit = `larger than ${Math.floor(about.max_bytes / 1e6)} MB, which no image needs`;
    if (file.size > about.max_bytes) throw new Error(limit);
    const { seen, predicted } = await ask("predict", { method: "POST", body: file });
    if (number !== asked) return;
    const verdict = `On the left is what the network saw: ${about.side} × ${about.side} pixels.`;
    const alt = `${file.name}, as the network saw it`;
    at("seen").replaceChildren(card(seen, alt, file.name, verdict, predicted));
  } catch (error) {
    if (number !== asked) return;
    at("seen").replaceChildren();
    at("problem").textContent = `${file.name}: ${error.message}`;
  }
}

function acceptPictures() {
  at("file").addEventListener("change", () => at("file").files[0] && predict(at("file").files[0]));
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) predict(file);
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault(); // the browser would open the picture in place of the page
      document.body.classList.toggle("dragging", name === "dragover");
    });
  }
  document.addEventListener("drop", (event) => {
    const [file] = event.dataTransfer.files;
    if (file) predict(file);
    else at("problem").textContent = "What was dropped is no file; save the picture first.";
  });
}

/** A button that shows the mistakes of a class, or those of a pair of classes. */
function chooser(label, guess, text) {
  const button = make("button", { type: "button" }, text);
  button.dataset.choice = `${label} ${guess}`;
  button.addEventListener("click", () => choose({ label, guess, start: 0 }));
  return button;
}

function row(name, ...cells) {
  const head = make("th", { scope: "row" }, name);
  return make("tr", {}, head, ...cells.map((cell) => make("td", { className: "number" }, ...cell)));
}

function classRow({ name, images, correct }, label) {
  const share = correct / images;
  const accuracy = [(100 * share).toFixed(1), bar(share)];
  return row(chooser(label, null, name), accuracy, [images - correct], [images]);
}

function pairRow({ label, guess, count }) {
  const name = chooser(label, guess, classes[label].name);
  const line = row(name, [count]);
  line.firstChild.after(make("td", {}, classes[guess].name));
  return line;
}

async function choose(wanted) {
  choice = wanted;
  const pressed = `${choice.label} ${choice.guess}`;
  for (const button of document.querySelectorAll("[data-choice]"))
    button.setAttribute("aria-pressed", button.dataset.choice === pressed);
  const query = new URLSearchParams(Object.entries(choice).filter(([, value]) => value !== null));
  at("unread").textContent = "";
  try {
    const { total, images } = await ask(`mistakes/images?${query}`);
    if (wanted === choice) showMistakes(total, images);
  } catch (error) {
    if (wanted === choice) at("unread").textContent = error.message;
  }
}

function showMistakes(total, images) {
  const { label, guess, start } = choice;
  const of = label === null ? "all classes" : classes[label].name;
  const as = guess === null ? "" : ` taken for ${classes[guess].name}`;
  const range = images.length ? `${start + 1} to ${start + images.length} of ${total}` : "none";
  at("chosen").textContent = `Mistakes of ${of}${as}: ${range}`;
  at("all").disabled = label === null;
  at("previous").disabled = start === 0;
  at("next").disabled = start + about.page >= total;
  const cards = images.map(({ png, label: truth, predicted }) => {
    const verdict = `taken for ${predicted[0].name}`;
    return card(png, `Validation image of the class ${truth}`, truth, verdict, predicted, truth);
  });
  at("pictures").replaceChildren(...cards);
}

/** Ask until the server has evaluated the validation images, then show its tables. */
async function loadMistakes() {
  const found = await ask("mistakes");
  at("note").textContent = found.note;
  if (!found.ready) return setTimeout(() => start(loadMistakes), 1000);
  classes = found.classes;
  if (!classes.length) return;
  const rows = classes.map((each, label) => ({ each, label })).filter(({ each }) => each.images);
  rows.sort((a, b) => a.each.correct / a.each.images - b.each.correct / b.each.images);
  at("classes").replaceChildren(...rows.map(({ each, label }) => classRow(each, label)));
  at("confused").replaceChildren(...found.confused.map(pairRow));
  at("found").hidden = false;
  choose(choice);
}

async function load() {
  about = await ask("about");
  document.title = `${about.run}: fastlab show`;
  at("run").textContent = about.run;
  at("about").textContent =
    `${about.model}, ${about.checkpoint} weights: ${about.classes} classes, ` +
    `images of ${about.side} × ${about.side} pixels`;
  acceptPictures();
  at("all").addEventListener("click", () => choose({ label: null, guess: null, start: 0 }));
  for (const [id, step] of [["previous", -about.page], ["next", about.page]])
    at(id).addEventListener("click", () => choose({ ...choice, start: choice.start + step }));
  await loadMistakes();
}

/** Run a step of the start, and show its error in the page. */
function start(step) {
  step().catch((error) => (at("note").textContent = error.message));
}

start(load);
